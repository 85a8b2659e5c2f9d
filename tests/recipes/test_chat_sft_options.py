"""The recipe on a tiny model: what its options do, what stands in the run folder, stopping and going on."""

import io
import json
import math
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from mint.data import Cursor
from mint.errors import DataError, InputError
from mint.recipes import chat_sft as recipe
from mint.recipes.chat_sft import chat_sft, dry_run
from mint.recipes.config import ChatSftConfig, load_config
from mint.recipes.evaluation import Evaluation
from mint.recipes.interrupt import StopOnCtrlC
from mint.recipes.progress import TrainingProgress


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setenv("MINT_DTYPE", "float32")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    rows = [
        [{"role": "user", "content": f"Name {i}?"}, {"role": "assistant", "content": f"It is {i * i}, of course."}]
        for i in range(30)
    ]
    rows[3] = [{"role": "user", "content": "no answer"}]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tiny_model, chats):
    return ChatSftConfig(
        base_model=tiny_model, dataset=chats, num_steps=6, batch_size=3, rank=4, max_length=128, learning_rate=1e-2,
        eval_size=2, eval_every=2, save_every=4, prompts=("Name 1?",), sample_tokens=8, max_loss=0.04,
    )  # fmt: skip


def quiet():
    return Console(file=io.StringIO(), width=200)


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "wait_seconds")} for row in rows]


@pytest.fixture
def stop_after(monkeypatch, ctrl_c_interrupts):
    """As if the user pressed Ctrl-C during a step."""

    def at(step):
        plain = TrainingProgress.step_done

        def step_done(self, row):
            plain(self, row)
            if row["step"] == step:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(TrainingProgress, "step_done", step_done)

    return at


def test_the_run_folder_holds_what_was_asked_for_and_what_came_of_it(config, tmp_path):
    out, console = tmp_path / "out", quiet()
    summary = chat_sft(config, out, console)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "loss.png", "samples.md", "summary.json", "data_certificate.json"
    }  # fmt: skip
    assert load_config(out) == config
    assert json.loads((out / "summary.json").read_text()) == summary
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    nlls = {row["step"]: row["test_nll"] for row in rows if "test_nll" in row}
    assert list(nlls) == [0, 2, 4, 6]
    assert (summary["test_nll_before"], summary["test_nll_after"]) == (nlls[0], nlls[6]) and nlls[6] < nlls[0]
    assert summary["status"] == "finished" and summary["step"] == 6
    assert summary["tokens"] == sum(row["tokens"] for row in rows if "loss" in row)
    assert summary["rows_skipped"] in ({}, {"no_assistant": 1})
    assert summary["samples"][0]["prompt"] == "Name 1?"
    assert all(row["learning_rate"] == 1e-2 and row["grad_norm"] > 0 for row in rows if "loss" in row)


def test_every_evaluation_records_all_measures_of_the_same_tokens(config, tmp_path):
    console = quiet()
    summary = chat_sft(config, tmp_path / "out", console)
    rows = [row for row in metrics(tmp_path / "out") if "test_nll" in row]
    assert len({row["test_hash"] for row in rows}) == 1
    for row, when in ((rows[0], "before"), (rows[-1], "after")):
        found = Evaluation(**summary[f"evaluation_{when}"])
        assert found.row(row["step"]) == row and found.nll == summary[f"test_nll_{when}"] and found.rows == 2
    for row in rows:
        assert row["test_perplexity"] == math.exp(row["test_nll"])
        bits = row["test_nll"] * row["test_tokens"] / math.log(2)  # all weights are 1
        assert row["test_bits_per_byte"] == pytest.approx(bits / found.bytes)
    before, after = rows[0], rows[-1]
    for name, key in [
        ("test NLL", "test_nll"), ("mean of rows", "test_row_nll"), ("perplexity", "test_perplexity"),
        ("bits per byte", "test_bits_per_byte"),
    ]:  # fmt: skip
        assert re.search(rf"^{name}: +{before[key]:.4f} -> {after[key]:.4f}\b", console.file.getvalue(), re.MULTILINE)


def test_a_resumed_run_that_measures_other_tokens_compares_nothing(config, tmp_path):
    out, said = tmp_path / "out", "the test rows do not give the tokens that were measured before training"
    chat_sft(config, out, quiet())
    same, other = quiet(), quiet()
    chat_sft(load_config(out, num_steps=7), out, same, resume=True)
    assert said not in same.file.getvalue() and re.search(r"test NLL: +\S+ -> \S+", same.file.getvalue())
    summary = chat_sft(load_config(out, num_steps=8, eval_size=3), out, other, resume=True)
    text = other.file.getvalue()
    assert said in text and "so there is nothing to compare these numbers with" in text
    assert not re.search(r"test NLL: +\S+ -> ", text) and f"test NLL:      {summary['test_nll_after']:.4f}" in text
    hashes = [row["test_hash"] for row in metrics(out) if "test_hash" in row]
    assert hashes[-1] != hashes[-2] == hashes[0]


def test_ctrl_c_ends_after_the_step_saves_and_says_how_to_go_on(config, tmp_path, stop_after):
    stop_after(3)
    console = quiet()
    stopped = chat_sft(config, tmp_path / "out", console)
    assert (stopped["status"], stopped["step"], stopped["test_nll_after"]) == ("interrupted", 3, None)
    text = console.file.getvalue()
    assert "finishing this step, then saving" in text and f"mint sft --resume {tmp_path / 'out'}\n" in text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnCtrlC(quiet()) as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.requested and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(config, tmp_path, stop_after, monkeypatch):
    whole = chat_sft(config, tmp_path / "whole", quiet())
    plain = TrainingProgress.step_done
    stop_after(3)
    chat_sft(config, tmp_path / "parts", quiet())
    monkeypatch.setattr(TrainingProgress, "step_done", plain)
    resumed = chat_sft(load_config(tmp_path / "parts"), tmp_path / "parts", quiet(), resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for key in ("test_nll_before", "test_nll_after", "first_train_loss", "last_train_loss", "samples", "status"):
        assert resumed[key] == whole[key], key


def test_workers_and_cache_change_no_number_and_the_wait_is_told(config, tmp_path, mint_home):
    others = psutil.Process().children()
    plain = chat_sft(config, tmp_path / "plain", quiet())
    with_both = replace(config, workers=1, cache=True)
    for name in ("empty cache", "full cache"):
        console = quiet()
        summary = chat_sft(with_both, tmp_path / name, console)
        assert metrics(tmp_path / name) == metrics(tmp_path / "plain")
        assert (summary["samples"], summary["rows_skipped"]) == (plain["samples"], plain["rows_skipped"])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "loss" in row]
        assert all(0 < row["wait_seconds"] < row["seconds"] for row in steps)
        share = sum(row["wait_seconds"] for row in steps) / sum(row["seconds"] for row in steps)
        assert summary["wait_share"] == pytest.approx(share)
        assert f"waited for data {share:.1%} of the time" in console.file.getvalue()
        assert f"step    6/6  loss {steps[-1]['loss']:.4f}" in console.file.getvalue()
    assert (mint_home / "cache" / "conversions-1.sqlite").is_file()
    assert set(psutil.Process().children()) <= set(others)


@pytest.mark.parametrize(
    ("device", "chosen", "expected"), [("cpu", None, 0), ("cuda", None, 1), ("cpu", 2, 2), ("mps", 0, 0)]
)
def test_a_worker_prepares_rows_beside_an_accelerator_unless_told_otherwise(config, device, chosen, expected):
    client = SimpleNamespace(get_info=lambda: SimpleNamespace(device=device))
    assert recipe.worker_count(replace(config, workers=chosen), client) == expected


def test_a_raised_goal_is_remembered_by_a_run_that_is_stopped_on_its_way(config, tmp_path, stop_after):
    out = tmp_path / "out"
    chat_sft(config, out, quiet())
    stop_after(7)
    assert chat_sft(load_config(out, num_steps=9), out, quiet(), resume=True)["status"] == "interrupted"
    assert chat_sft(load_config(out), out, quiet(), resume=True)["step"] == 9  # as the printed command does it


def test_a_finished_run_is_continued_by_more_steps_and_metrics_after_the_checkpoint_are_forgotten(config, tmp_path):
    out = tmp_path / "out"
    chat_sft(config, out, quiet())
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n')  # as a run leaves it that is killed between two checkpoints
    with pytest.raises(InputError, match=r"6 steps are done; to go on, ask for more than that \(--steps\)"):
        chat_sft(load_config(out), out, quiet(), resume=True)
    summary = chat_sft(load_config(out, num_steps=8), out, quiet(), resume=True)
    assert summary["step"] == 8 and [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, 9))


def test_earlier_results_are_not_written_over(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=rf"already holds a run; go on with it \(mint sft --resume {out}\) or give"):
        chat_sft(config, out, quiet())
    assert [path.name for path in out.iterdir()] == ["summary.json"]
    (out / "summary.json").unlink()
    with pytest.raises(InputError, match=r"holds no summary.json: it is not the folder of a run that saved something"):
        chat_sft(config, out, quiet(), resume=True)


def test_the_certificate_of_the_data_is_kept_in_the_folder_and_in_every_checkpoint(config, tmp_path):
    import mint

    console = quiet()
    summary = chat_sft(config, tmp_path / "out", console)
    written = json.loads((tmp_path / "out" / "data_certificate.json").read_text())
    assert written["dataset"] == config.dataset and written["model"]["name"] == config.base_model
    assert (written["train"]["rows"] + written["test"]["rows"], written["is_sample"]) == (30, False)
    reasons = [reason for part in ("train", "test") for reason in written[part]["dropped"]]
    assert reasons == ["no_assistant"]
    assert f"data check: ok: {config.dataset}, " in console.file.getvalue()
    service = mint.ServiceClient()
    with service:
        info = service.create_rest_client().get_weights_info_by_tinker_path(summary["checkpoint"]).result()
    kept = json.loads(info.user_metadata["data_certificate"])
    assert kept["train"]["rendered_sha256"] == written["train"]["rendered_sha256"]
    assert kept["test"]["rendered_sha256"] == written["test"]["rendered_sha256"]
    assert len(info.user_metadata["data_certificate"]) < 2048


def test_training_is_refused_where_too_much_would_be_lost(config, tmp_path, chats):
    out = tmp_path / "out"
    expected = rf"{config.dataset}: 3\.\d\d% of the rows would be lost, allowed are 1\.00%\. mend or remove the rows dropped as "
    with pytest.raises(DataError, match=rf"{expected}no_assistant; .*All of it: {out / 'data_certificate.json'}"):
        chat_sft(replace(config, max_loss=0.01), out, quiet())
    assert json.loads((out / "data_certificate.json").read_text())["verdict"] == "refused"
    assert metrics(out) == []
    mended = tmp_path / "mended.jsonl"
    mended.write_text(
        "".join(line for line in Path(chats).read_text().splitlines(keepends=True) if "no answer" not in line)
    )
    again = replace(config, dataset=str(mended), max_loss=0.01)
    assert chat_sft(again, out, quiet())["status"] == "finished"  # nothing was saved, so the folder is free
    assert json.loads((out / "data_certificate.json").read_text())["verdict"] == "ok"


def test_a_resumed_run_goes_on_with_the_same_data_or_with_data_declared_to_be_other(config, tmp_path, chats):
    own = tmp_path / "chats.jsonl"
    lines = Path(chats).read_text().splitlines(keepends=True)
    own.write_text("".join(lines))
    out = tmp_path / "out"
    chat_sft(replace(config, dataset=str(own)), out, quiet())
    before = json.loads((out / "data_certificate.json").read_text())
    own.write_text("".join([*lines[:-1], lines[-1].replace("of course", "naturally")]))
    more = load_config(out, num_steps=7)
    expected = rf"{own}: the \w+ rows render to other tokens than when this run began \(\w{{12}}, now \w{{12}}\)"
    with pytest.raises(DataError, match=expected):
        chat_sft(more, out, quiet(), resume=True)
    assert json.loads((out / "data_certificate.json").read_text()) == before
    assert chat_sft(more, out, quiet(), resume=True, data_changed=True)["step"] == 7
    after = json.loads((out / "data_certificate.json").read_text())
    changed = [part for part in ("train", "test") if after[part]["rendered_sha256"] != before[part]["rendered_sha256"]]
    assert len(changed) == 1
    assert chat_sft(load_config(out, num_steps=8), out, quiet(), resume=True)["step"] == 8


def test_of_a_large_set_a_sample_is_checked_and_says_so(config, tmp_path, monkeypatch):
    monkeypatch.setattr("mint.recipes.data_certificate.FULLY_CHECKED_ROWS", 9)
    console = quiet()
    chat_sft(replace(config, max_loss=0.2), tmp_path / "out", console)
    written = json.loads((tmp_path / "out" / "data_certificate.json").read_text())
    assert written["is_sample"] and (written["train"]["rows"], written["train"]["rows_in_set"]) == (9, 27)
    assert "of 9 training rows, a sample, " in console.file.getvalue()


def test_the_bar_of_a_check_counts_its_rows(chats, tiny_model):
    from mint.chat import Converter
    from mint.data import load_chat_set
    from mint.data.certificate import model_facts
    from mint.data.checking import DataCheck
    from mint.hub import load_tokenizer
    from mint.recipes.data_certificate import run_check

    tokenizer = load_tokenizer(tiny_model)
    converter, facts = Converter(tokenizer, 128), model_facts("m", tokenizer)
    terminal = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    found = run_check(DataCheck(load_chat_set(chats), converter, facts, mint_version="1"), terminal)
    assert (found.train.rows, found.test.rows, found.is_interrupted) == (27, 3, False)
    assert "data check, row 20/30 " in terminal.file.getvalue() and " rows/s left " in terminal.file.getvalue()
    assert converter.report.rows == 0  # those of training are counted when they are trained on


def test_a_dry_run_plans_without_saving(config, tmp_path, mint_home):
    plan = dry_run(config, quiet())
    assert plan["steps"] == 6 and plan["epochs"] == round(6 / (27 // 3), 2)
    assert plan["tokens"] == pytest.approx(6 * plan["tokens_per_step"], abs=6)
    assert plan["eta_seconds"] >= 0 and plan["memory_bytes"] > 2**20 and plan["tokens_per_second"] > 0
    assert not list(mint_home.glob("runs/*/weights")) and list(tmp_path.iterdir()) == [mint_home]


def test_bad_options_are_refused_before_anything_is_loaded():
    for changed, text in [
        ({"num_steps": 0}, "num_steps=0: must be at least 1"),
        ({"save_every": -1}, r"save_every=-1: must be 0 \(never in between\)"),
        ({"schedule": "step"}, "schedule='step': allowed are constant, linear, cosine"),
        ({"workers": -1}, r"workers=-1: must be 0 \(rows are prepared in this process\) or more"),
        ({"warmup_steps": 51}, r"warmup_steps=51: must lie in 0\.\.50"),
    ]:
        with pytest.raises(InputError, match=text):
            ChatSftConfig(**changed)
    with pytest.raises(InputError, match=r"config\.json: unknown options colour; was another MinT here"):
        ChatSftConfig.from_json({"colour": 1})


def test_the_cursor_in_the_checkpoint_is_where_the_data_goes_on(config, tmp_path):
    import mint

    summary = chat_sft(config, tmp_path / "out", quiet())
    with mint.ServiceClient() as service:
        cursor = recipe.saved_cursor(service, summary["checkpoint"])
    assert cursor.epoch == 0 and cursor.position in (18, 19)  # 6 steps of 3 rows, one row may have been skipped
    assert isinstance(cursor, Cursor)

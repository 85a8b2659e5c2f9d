"""The recipe on a tiny model: what its options do, what stands in the run folder, stopping and going on."""

import io
import json
import math
import re
import signal

import pytest
from rich.console import Console

from mint.data import Cursor
from mint.errors import InputError
from mint.recipes import chat_sft as recipe
from mint.recipes.chat_sft import ChatSftConfig, chat_sft, dry_run, load_config
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
        eval_size=2, eval_every=2, save_every=4, prompts=("Name 1?",), sample_tokens=8,
    )  # fmt: skip


def quiet():
    return Console(file=io.StringIO(), width=200)


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


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
        "config.json", "metrics.jsonl", "loss.png", "samples.md", "summary.json"
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

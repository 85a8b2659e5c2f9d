"""Every command but the big one, on a tiny model: what it prints, its JSON, its exit codes, its help."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

import mint
from mint import types
from mint.cli.main import app
from tests.support.clients import batch, train

pytestmark = pytest.mark.usefixtures("logging_as_before")

runner = CliRunner()


def invoke(*arguments: str, text: str = "") -> Result:
    return runner.invoke(app, list(arguments), input=text, env={"COLUMNS": "160"})


def answer(*arguments: str) -> Any:
    """The JSON that a command prints; it stands alone on stdout."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def path(tiny_model: str) -> str:
    """A checkpoint with two steps, of a run that saved another one for sampling."""
    with mint.ServiceClient() as service:
        run = service.create_lora_training_client(tiny_model, rank=4, seed=0)
        train(run, 2)
        run.save_weights_for_sampler("sampler").result()
        return run.save_state("two", user_metadata={"why": "test"}).result().path


def run_of(path: str) -> str:
    return types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id


def commands() -> list[list[str]]:
    group = typer.main.get_command(app)
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, sub] for sub in inner] if inner else [[name]]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(command: list[str]) -> None:
    shown = invoke(*command, "--help")
    assert shown.exit_code == 0 and f"Example: mint {' '.join(command)} " in shown.stdout + " "


def test_the_version_is_shown() -> None:
    assert invoke("--version").stdout == f"mint {mint.__version__}\n"


def test_runs_are_listed_shown_and_drawn(path: str, tiny_model: str, tmp_path: Path) -> None:
    run = run_of(path)
    with mint.ServiceClient() as service:
        service.create_lora_training_client(tiny_model, rank=2)
    listed = answer("runs", "list")
    assert [entry["run"] for entry in listed] == [run]
    assert (listed[0]["steps"], listed[0]["rank"], listed[0]["last_checkpoint"]) == (2, 4, path)
    assert len(answer("runs", "list", "--all")) == 2
    text = invoke("runs", "list").stdout
    assert run in text and "1 runs that saved nothing are not shown (--all)" in text
    shown = answer("runs", "show", run)
    assert {c["checkpoint_id"] for c in shown["checkpoints"]} == {"weights/two", "sampler_weights/sampler"}
    assert path in invoke("runs", "show", run).stdout
    picture = tmp_path / "loss.png"
    assert invoke("runs", "plot", run, "--out", str(picture)).stdout == f"{picture}: 2 steps\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_loss_of_a_run_is_the_mean_over_its_trained_positions(path: str, tiny_model: str) -> None:
    with mint.ServiceClient() as service:
        run = service.create_lora_training_client(tiny_model, rank=4, seed=0)
        output = run.forward_backward(batch()).result()
        run.optim_step().result()
        weights = sum(float((d.loss_fn_inputs["weights"].to_numpy() != 0).sum()) for d in batch())
        shown = answer("runs", "show", run.model_id)
    assert shown["loss"] == pytest.approx(output.metrics["loss:sum"] / weights, rel=1e-6)


def test_checkpoints_are_listed_shown_and_deleted(path: str) -> None:
    assert {c["tinker_path"] for c in answer("checkpoints", "list")} == {
        path,
        f"tinker://{run_of(path)}/sampler_weights/sampler",
    }
    assert len(answer("checkpoints", "list", "--run", run_of(path))) == 2
    shown = answer("checkpoints", "show", path)
    assert (shown["lora_rank"], shown["user_metadata"], shown["checkpoint_id"]) == (4, {"why": "test"}, "weights/two")
    assert path in invoke("checkpoints", "list").stdout
    kept = invoke("checkpoints", "delete", path, text="n\n")
    assert kept.exit_code == 1 and len(answer("checkpoints", "list")) == 2
    gone = invoke("checkpoints", "delete", path, "--yes")
    assert gone.exit_code == 0 and f"deleted {path}" in gone.stdout
    assert len(answer("checkpoints", "list")) == 1


def test_a_script_gets_the_answers_that_the_client_gets(path: str) -> None:
    found = answer("sample", path, "Hello", "Bye", "-n", "2", "--max-tokens", "5", "--seed", "3")
    assert [entry["prompt"] for entry in found] == ["Hello", "Bye"]
    with mint.ServiceClient() as service:
        from mint.chat import get_renderer

        client = service.create_sampling_client(path)
        renderer = get_renderer(client.get_tokenizer())
        params = types.SamplingParams(max_tokens=5, temperature=0.7, seed=3, stop_token_ids=renderer.stop_token_ids)
        ids = renderer.prompt([{"role": "user", "content": "Bye"}])
        expected = client.sample(types.ModelInput.from_ints(ids), 2, params).result().sequences
    assert [s["tokens"] for s in found[1]["samples"]] == [s.tokens for s in expected]
    assert [s["logprobs"] for s in found[1]["samples"]] == [s.logprobs for s in expected]


def test_prompts_come_from_standard_input_too(path: str) -> None:
    done = invoke("sample", path, "--max-tokens", "2", "--temperature", "0", text="one\n\ntwo\n")
    assert done.exit_code == 0 and re.findall("^--- (.*)$", done.stdout, re.MULTILINE) == ["one", "two"]
    empty = invoke("sample", path, text="")
    assert empty.exit_code == 1 and "error: no prompt: give one as an argument" in empty.stderr


def test_raw_text_is_continued_without_a_template(path: str) -> None:
    found = answer("sample", path, "--raw", "Hello", "--max-tokens", "3", "--temperature", "0")
    with mint.ServiceClient() as service:
        client = service.create_sampling_client(path)
        ids = client.get_tokenizer().encode("Hello")
        params = types.SamplingParams(max_tokens=3, temperature=0.0)
        expected = client.sample(types.ModelInput.from_ints(ids), 1, params).result().sequences[0].tokens
    assert found[0]["samples"][0]["tokens"] == expected


def test_a_conversation_remembers_until_it_is_reset(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, str]]] = []
    from mint.chat.renderer import Renderer

    plain = Renderer.prompt
    monkeypatch.setattr(Renderer, "prompt", lambda self, messages: seen.append(list(messages)) or plain(self, messages))
    done = invoke(
        "chat", path, "--system", "Be brief.", "--max-tokens", "4", "--seed", "1", "--temperature", "0",
        text="one\ntwo\n/reset\nthree\n/system Sing.\nfour\n/what\n/quit\nfive\n",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [
        ["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"], ["system", "user"]
    ]  # fmt: skip
    assert [messages[-1]["content"] for messages in seen] == ["one", "two", "three", "four"]
    assert [messages[0]["content"] for messages in seen] == ["Be brief."] * 3 + ["Sing."]
    said = seen[1][2]["content"]
    assert said and "".join(c for c in said if c.isprintable()) in done.stdout.replace("\n", "")
    assert done.stdout.count("/reset forgets the conversation") == 2  # at the start, and for /what


def test_a_model_cannot_steer_the_terminal(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mint.cli.talk import Speaker

    monkeypatch.setattr(Speaker, "ask", lambda *_: iter(["a\x1b[2J", "b\rc\n", "\td\x9be"]))
    shown = invoke("chat", path, text="hi\n").stdout
    assert "two> a[2Jbc\n" in shown and shown.split("two> a[2Jbc\n")[1].split()[0] == "de"


def test_base_and_tuned_answer_side_by_side(path: str, tiny_model: str) -> None:
    done = invoke("chat", path, "--compare", "--max-tokens", "3", text="hello\n")
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if "two" in line and "─" in line)
    assert "qwen3" in line  # both titles
    refused = invoke("chat", tiny_model, "--compare")
    assert refused.exit_code == 1 and "is a base model itself; give a checkpoint" in refused.stderr


def test_a_conversation_that_became_too_long_can_go_on_after_a_reset(path: str) -> None:
    done = invoke("chat", path, "--max-tokens", "500", text="hello\n/quit\n")
    assert done.exit_code == 0 and "exceed the context of 512" in done.stdout and "/reset makes room" in done.stdout


def test_models_are_shown(tiny_model: str) -> None:
    shown = answer("models", "show", tiny_model)
    assert (shown["architecture"], shown["layers"], shown["vocabulary"]) == ("Qwen3ForCausalLM", 2, 384)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    stored = {p.data_ptr(): p.numel() for p in model.parameters()}  # a tied matrix is stored once
    assert shown["parameters"] == sum(stored.values())
    assert (shown["chat template"], shown["runs on"]) == ("chatml, can think", "MinT's own decoder")
    assert "Qwen3ForCausalLM" in invoke("models", "show", tiny_model).stdout
    pulled = answer("models", "pull", tiny_model)
    assert pulled["path"] == tiny_model


def test_the_packaged_model_is_listed_whether_it_is_here_or_not() -> None:
    listed = answer("models", "list")
    assert listed[0] == {"name": "SmolLM2-135M-Instruct", "origin": "package", "path": None, "bytes": None}
    assert "no; mint models pull fetches it" in invoke("models", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["runs", "show", "nobody"], "no run 'nobody'"),
        (["runs", "plot", "nobody"], "no run 'nobody'"),
        (["checkpoints", "show", "final"], "checkpoint path 'final': a checkpoint path has the form"),
        (["checkpoints", "delete", "tinker://nobody/weights/a", "--yes"], "no run 'nobody'"),
        (["chat", "./nowhere"], "there is no folder 'nowhere'"),
        (["sample", "tinker://nobody/weights/a", "hi"], "no run 'nobody'"),
        (["models", "pull", "nonsense"], "there is no base model 'nonsense'"),
        (["models", "show", "./nowhere"], "there is no folder 'nowhere'"),
        (["export", "final", "nowhere/out"], "checkpoint path 'final'"),
        (["sft", "--dataset", "nowhere.jsonl"], "data set 'nowhere.jsonl': there is no such file"),
        (["sft", "--shuffle-buffer", "9"], "--shuffle-buffer belongs to --stream"),
        (["sft", "--stream", "--dataset", "a.csv", "--dataset", "b.csv"], "streaming takes a buffer of at least 1 and"),
        (["sft", "--resume", "nowhere"], "holds no config.json"),
        (["sft", "--resume", "x", "--rank", "4"], "--resume takes its options from the run's config.json"),
        (["sft", "--steps", "4", "--epochs", "1", "--offline"], "give --steps or --epochs, not both"),
    ],
)
def test_what_cannot_be_done_is_one_message_on_stderr_and_exit_code_1(arguments: list[str], text: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 1 and text in done.stderr.replace("\n", " "), done.output
    assert "Traceback" not in done.output


def test_an_unreachable_hub_is_answered_with_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("sft")
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "HuggingFaceH4/no_robots is not (completely) in the Hugging Face cache" in message
    assert message.endswith("`mint sft --offline` runs without any hub")


def test_sft_trains_a_file_and_prints_its_summary_as_json(tiny_model: str, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(12)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = ["--model", tiny_model, "--dataset", str(data), "--batch-size", "2", "--max-length", "64", "--rank", "2"]
    summary = answer(
        "sft", *options, "--epochs", "1", "--modules", "mlp", "--out", str(tmp_path / "out"), "--prompt", "hi"
    )
    assert summary["step"] == 5 and summary["status"] == "finished"  # 11 rows, one held out
    shown = answer("checkpoints", "show", summary["checkpoint"])
    assert (shown["train_mlp"], shown["train_attn"], shown["train_unembed"]) == (True, False, False)
    more = answer("sft", "--resume", str(tmp_path / "out"), "--steps", "6")
    assert more["step"] == 6
    talk = invoke(
        "chat", str(tmp_path / "out"), "--max-tokens", "2", text="hi\n"
    )  # a run folder is a name for its last
    assert talk.exit_code == 0, talk.output
    plan = answer("sft", *options, "--steps", "3", "--dry-run")
    assert plan["steps"] == 3 and plan["tokens"] > 0


def test_a_folder_that_cannot_be_written_is_one_message(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = invoke("sft", "--model", tiny_model, "--dataset", "packaged", "--out", str(tmp_path / "file" / "out"))
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "error:" in done.stderr and str(tmp_path / "file") in done.stderr.replace("\n", "")


def test_wrong_use_is_exit_code_2() -> None:
    for arguments in (
        ["sft", "--schedule", "step"],
        ["sft", "--modules", "all"],
        ["chat"],
        ["runs"],
        ["sft", "--steps", "0"],
    ):
        assert invoke(*arguments).exit_code == 2


def test_sft_takes_a_mixture_with_columns_and_test_rows_and_resumes_it(tiny_model: str, tmp_path: Path) -> None:
    chats, table, held_out = tmp_path / "chats.jsonl", tmp_path / "table.csv", tmp_path / "held_out.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(9)))
    table.write_text("question,reply\n" + "".join(f"t{i},yes\n" for i in range(9)))
    held_out.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    options = [
        *("--model", tiny_model, "--dataset", str(chats), "--dataset", f"{table}=0.25", "--test", str(held_out)),
        *("--columns", f"{table}:prompt=question,completion=reply", "--batch-size", "2", "--max-length", "64"),
    ]
    out = str(tmp_path / "out")
    summary = answer("sft", *options, "--epochs", "1", "--rank", "2", "--prompt", "hi", "--out", out)
    assert summary["step"] == 6  # 9 rows of chats are three quarters, so 12 in all
    assert (summary["dataset"], summary["test_rows"]) == (f"{chats} + {table}=0.25", 1)
    assert answer("sft", "--resume", out, "--steps", "7")["step"] == 7


def test_sft_streams_a_packed_file_and_goes_on_in_its_order(tiny_model: str, tmp_path: Path, mint_home: Path) -> None:
    data = tmp_path / "chats.jsonl.gz"
    data.write_bytes(gzip.compress("".join(
        json.dumps({"prompt": f"q{i}", "completion": f"a{i}" * (1 + i % 7)}) + "\n" for i in range(40)
    ).encode()))  # fmt: skip
    options = [
        *("--model", tiny_model, "--dataset", str(data), "--stream", "--shuffle-buffer", "6", "--batch-size", "3"),
        *("--max-length", "64", "--rank", "2", "--prompt", "hi"),
    ]
    losses = []
    for name, steps in (("whole", "8"), ("parts", "5")):
        answer("sft", *options, "--steps", steps, "--out", str(tmp_path / name))
    answer("sft", "--resume", str(tmp_path / "parts"), "--steps", "8")
    for name in ("whole", "parts"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert not (mint_home / "datasets").exists()  # nothing was unpacked

"""`mint doctor`: what it says of the machine, of a model that is here, of one that is known by its config.json only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from mint.cli import doctor, doctor_model
from mint.cli.doctor import judge, kernels_state
from mint.cli.doctor_model import ModelReport, advise
from mint.cli.main import app
from mint.engine import host
from mint.engine.forecast import HostSpeed, MemoryNeed, Speed

pytestmark = pytest.mark.usefixtures("logging_as_before")

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
GIB = 2**30


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "400"})


def answer(*arguments: str) -> Any:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def write_config(folder: Path, **fields: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SMOLLM2_135M, **fields}))
    return str(folder)


@pytest.fixture
def known_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of 100 GFLOP/s and 28 GB/s that computes in float32."""
    monkeypatch.setattr(host, "measure_host", lambda device, projections: HostSpeed(100e9, 28e9))
    monkeypatch.setenv("MINT_DTYPE", "float32")


def test_a_model_that_is_here_is_forecast_and_measured_and_nothing_is_changed(tiny_model: str, mint_home: Path) -> None:
    found = answer("--model", tiny_model)
    for word in ("expected", "measured"):
        assert found[word]["training_tokens_per_second"] > 0
        assert [n for n, speed in found[word]["sampling_tokens_per_second"].items() if speed > 0] == ["1", "8", "32"]
    assert found["host"]["gflop_per_second"] > 0 and found["host"]["read_gb_per_second"] > 0
    assert found["threads"] == 1 and found["problems"] == [] and found["versions"]["torch"].startswith("2.")
    assert found["hub"] == "not asked: HF_HUB_OFFLINE is set"
    assert (found["model"], found["notes"]) == (tiny_model, [])
    assert not mint_home.exists()


@pytest.mark.usefixtures("known_host")
def test_a_config_alone_is_enough_for_a_forecast(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "smol")
    found = answer("--model", folder)
    assert found["host"] == {"gflop_per_second": 100.0, "read_gb_per_second": 28.0}
    assert found["expected"] == {
        "training_tokens_per_second": 110.9,
        "sampling_tokens_per_second": {"1": 18.6, "8": 132.8, "32": 132.8},
    }
    assert found["measured"] is None
    assert found["notes"] == [f"not measured: its weights are not here (model.safetensors missing in {folder})"]
    memory = found["run_memory"]
    assert (memory["base_bytes"], memory["adapter_bytes"]) == (4 * 134_515_008, 90_882_048)
    assert memory["decoding_bytes"] == 0  # float32 weights are not packed
    shown = invoke("--model", folder).stdout
    assert "100 GFLOP/s in its products, reads 28.0 GB/s" in shown
    assert "training tokens/s                      expected 111\n" in "\n".join(map(str.rstrip, shown.splitlines()))
    assert "sampling tokens/s, 1 / 8 / 32 at once  expected 19 / 133 / 133" in shown
    assert "base 0.50 GiB, adapter 0.08 GiB, a pass of 2,048 tokens" in shown
    assert "8 sequences at once sample 7.1 times as fast as one (133 tokens/s against 19)" in shown


@pytest.mark.usefixtures("known_host")
def test_a_config_in_the_hugging_face_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--smol"
    folder = write_config(repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    found = answer("--model", "someone/smol")
    assert found["expected"]["training_tokens_per_second"] == 110.9
    assert found["notes"] == [f"not measured: its weights are not here (model.safetensors missing in {folder})"]
    assert answer("--model", f"someone/smol@{'a' * 40}")["expected"] == found["expected"]
    assert answer("--model", "someone/smol@other")["notes"][0].startswith("no forecast: someone/smol@other is not on")


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("SmolLM2-135M-Instruct", "mint models pull SmolLM2-135M-Instruct fetches it"),
        (
            "nobody/nothing",
            "hf download nobody/nothing config.json fetches its shape, which is enough for a forecast, and "
            "mint models pull nobody/nothing fetches it",
        ),
        (
            "a/b@v1",
            "hf download a/b config.json --revision v1 fetches its shape, which is enough for a forecast, and "
            "mint models pull a/b@v1 fetches it",
        ),
    ],
)
def test_of_a_model_that_is_not_here_nothing_is_said_but_how_to_get_it(model: str, how: str) -> None:
    found = answer("--model", model)
    assert found["notes"] == [f"no forecast: {model} is not on this machine; {how}"]
    assert (found["host"], found["expected"], found["measured"], found["run_memory"]) == (None, None, None, None)


def test_without_measuring_only_the_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "measure_host", lambda *_: pytest.fail("the host was measured"))
    found = answer("--no-measure", "--model", write_config(tmp_path / "smol"))
    assert (found["host"], found["expected"], found["measured"], found["notes"]) == (None, None, None, [])
    assert found["run_memory"]["fits"] is True


def test_a_model_that_runs_through_transformers_has_no_forecast(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answer("--model", write_config(tmp_path / "gpt", model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    assert found["notes"][0] == (
        "no forecast: it runs through transformers, for which no speed is claimed (MinT's own decoder does not cover "
        "model type 'gpt2' (GPT2LMHeadModel); covered: llama, mistral, qwen2, qwen3)"
    )
    assert found["notes"][1].startswith("not measured: its weights are not here")
    monkeypatch.setenv("MINT_BACKEND", "hf")
    measured = answer("--model", tiny_model)
    assert measured["notes"] == [
        "no forecast: it runs through transformers, for which no speed is claimed (MINT_BACKEND=hf)"
    ]
    assert measured["expected"] is None and measured["measured"]["training_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("fields", "backend", "text"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "", "quantised weights (gptq) are not supported"),
        ({"model_type": "gpt2"}, "decoder", "MinT's own decoder does not cover model type 'gpt2'"),
        ({"num_hidden_layers": 0}, "", "num_hidden_layers=0, expected a positive whole number"),
    ],
)
def test_a_config_that_cannot_be_run_is_an_error(
    fields: dict[str, Any], backend: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINT_BACKEND", backend)
    done = invoke("--model", write_config(tmp_path / "odd", **fields))
    assert done.exit_code == 1 and text in done.stderr


def test_what_names_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in [
        ("nonsense", "there is no base model 'nonsense': no folder of that name, and allowed are owner/name"),
        ("./nowhere", "there is no folder 'nowhere'"),
        (str(tmp_path / "empty"), "is not a complete model: config.json, model.safetensors missing"),
        ("a/b@..", "'..' in 'a/b@..' cannot be a revision"),
    ]:
        done = invoke("--model", name)
        assert done.exit_code == 1 and text in done.stderr, done.output


@pytest.mark.usefixtures("known_host")
def test_a_model_too_large_for_the_machine_is_forecast_and_not_loaded(tmp_path: Path) -> None:
    folder = write_config(
        tmp_path / "large",
        hidden_size=65536,
        intermediate_size=262144,
        num_attention_heads=512,
        num_key_value_heads=8,
        num_hidden_layers=500,
    )
    Path(folder, "model.safetensors").write_bytes(b"never opened")
    found = answer("--model", folder)
    assert found["expected"] is not None and found["measured"] is None and not found["run_memory"]["fits"]
    assert found["notes"][0].startswith("not measured: it takes ") and "GiB to load, and" in found["notes"][0]
    [hint] = [hint for hint in found["advice"] if "cannot be trained" in hint]
    assert "set MINT_DTYPE=bfloat16, which halves the weights, or take a smaller base model" in hint


def test_a_model_that_does_not_fit_beside_other_programs_is_not_loaded(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(doctor_model.psutil, "virtual_memory", lambda: crowded)
    monkeypatch.setattr(doctor_model, "measured_speed", lambda *_: pytest.fail("the model was loaded"))
    found = answer("--model", tiny_model)
    assert "to load, and 0.00 GiB of" in found["notes"][0] and found["expected"] is not None


def test_a_model_that_would_take_minutes_is_not_measured(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "measure_host", lambda *_: HostSpeed(1e6, 28e9))
    monkeypatch.setattr(doctor_model, "measured_speed", lambda *_: pytest.fail("the model was loaded"))
    [note] = answer("--model", tiny_model)["notes"]
    assert note.startswith("not measured: it would take about ") and note.endswith(" minutes")


def test_who_else_is_called_mint_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"mint": ["mindlab-toolkit", "mint-toolkit"]}
    )
    done = invoke("--no-measure")
    assert done.exit_code == 1 and "mindlab-toolkit installs a package `mint` too" in done.stdout


# advice

GOOD = {
    "other_distributions_named_mint": [], "MINT_HOME": "/home/.mint: writable", "busy_cores": 0.0, "threads": 8,
    "cores": 8, "dtype": "bfloat16", "bf16_products": True, "memory_available_bytes": 8 * GIB, "hub": "answers",
    "versions": {"gguf": "1"}, "kernels": "compiled by numba",
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"busy_cores": 0.6}, "other programs keep 0.6 of 8 cores busy"),
        ({"threads": 9}, "MINT_THREADS=9 is more than the 8 cores: unset it"),
        ({"threads": 3}, "MINT_THREADS=3 leaves 5 of 8 cores unused"),
        ({"dtype": "float32"}, "MINT_DTYPE=float32 on a processor that multiplies bf16 in hardware"),
        ({"memory_available_bytes": GIB}, "less than 2 GiB of memory is free"),
        (
            {"kernels": kernels_state("numba is not installed: pip install 'mint-toolkit[fast]'")},
            'pip install "mint-toolkit[fast]"',
        ),
        ({"kernels": kernels_state("MINT_KERNELS=torch")}, "MINT_KERNELS=torch where compiled"),
    ],
)
def test_each_fact_about_the_machine_has_its_advice(facts: dict[str, Any], text: str) -> None:
    assert judge(GOOD, "cpu") == ([], [])
    advice = judge({**GOOD, **facts}, "cpu")[1]
    assert [text in hint for hint in advice].count(True) == 1


def test_busy_neighbours_do_not_matter_while_cores_are_left() -> None:
    assert judge({**GOOD, "threads": 4, "busy_cores": 4.0}, "cpu")[1] == [
        "MINT_THREADS=4 leaves 4 of 8 cores unused: unset it, unless other programs need them"
    ]


def test_busy_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.psutil, "cpu_percent", lambda interval, percpu: [100.0, 25.0, 50.0])
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {1, 2}, raising=False)
    assert doctor.busy_cores() == 0.8


def memory(*, pass_tokens: int = 2048, limit: int = 8 * GIB, refusal: str | None = None) -> MemoryNeed:
    return MemoryNeed(GIB, GIB, GIB, GIB, pass_tokens, limit, refusal)


EXPECTED = Speed(100.0, {1: 10.0, 8: 40.0, 32: 60.0})
TOGETHER = (
    "8 sequences at once sample 4.0 times as fast as one (40 tokens/s against 10): ask for several together "
    "(num_samples, mint sample -n 8, several prompts)"
)


@pytest.mark.parametrize(
    ("report", "machine", "asked", "text"),
    [
        ({}, {"dtype": "float32", "bf16_products": False}, None, "this processor has no bf16 products"),
        ({"measured": Speed(59.0, EXPECTED.sampling)}, {}, None, "training runs at 59% of what this host's products"),
        ({"memory": memory(pass_tokens=999)}, {}, 999, "passes of 999 tokens are short, and products of less than 1,000 "
         "rows slow; MINT_MAX_TOKENS_PER_PASS=999: unset it"),
        ({"memory": memory(pass_tokens=400)}, {}, None, "rows slow; memory holds no more"),
        ({"memory": memory(limit=3 * GIB)}, {}, None, "a run of m that also samples takes 4.00 GiB of 3.00 GiB: lower "
         "MINT_MAX_TOKENS_PER_PASS (now 2,048)"),
        ({"memory": memory()}, {"memory_available_bytes": 3 * GIB}, None, "a run of m takes up to 4.00 GiB and 3.00 GiB "
         "are free: close programs, or lower MINT_MAX_TOKENS_PER_PASS"),
    ],
)  # fmt: skip
def test_each_fact_about_the_model_has_its_advice(
    report: dict[str, Any], machine: dict[str, Any], asked: int | None, text: str
) -> None:
    given: dict[str, Any] = {"host": HostSpeed(1e11, 1e10), "expected": EXPECTED, "memory": memory()}
    assert advise(ModelReport("m", [], **given), GOOD, None) == [TOGETHER]
    advice = advise(ModelReport("m", [], **{**given, **report}), {**GOOD, **machine}, asked)
    assert len(advice) == 2 and TOGETHER in advice
    assert any(text in hint for hint in advice), advice


def test_of_a_model_that_cannot_be_trained_nothing_else_is_said() -> None:
    report = ModelReport("m", [], HostSpeed(1e11, 1e10), EXPECTED, None, memory(refusal="no", limit=GIB))
    text = "m cannot be trained in 1.00 GiB: its weights take 1.00 GiB and the smallest pass 1.00 GiB; "
    smaller = "take a smaller base model or a machine with more memory"
    assert advise(report, GOOD, None) == [text + smaller]
    halves = "set MINT_DTYPE=bfloat16, which halves the weights, or "
    assert advise(report, {**GOOD, "dtype": "float32"}, None) == [text + halves + smaller]


def test_what_was_measured_is_compared_rather_than_what_was_expected() -> None:
    measured = Speed(61.0, {1: 20.0, 8: 30.0, 32: 50.0})
    [hint] = advise(ModelReport("m", [], HostSpeed(1e11, 1e10), EXPECTED, measured, memory()), GOOD, None)
    assert hint.startswith("8 sequences at once sample 1.5 times as fast as one (30 tokens/s against 20)")
    slower = Speed(61.0, {1: 20.0, 8: 19.0, 32: 50.0})
    assert advise(ModelReport("m", [], HostSpeed(1e11, 1e10), EXPECTED, slower, memory()), GOOD, None) == []

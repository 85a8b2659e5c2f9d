"""Models of the hub, against a fake one on loopback. Its clients read HF_ENDPOINT once, at import: child processes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.fakehub import FakeHub, child_env, commit_of
from tests.support.tiny_models import write_tiny_tokenizer

from mint.hub.hub_cache import within

PRELUDE = """
import json, logging, os, sys, time
import urllib.request
from pathlib import Path
import mint.hub
from mint.hub import load_tokenizer, resolve_model

class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

lines, outcomes = [], {}
logging.getLogger("mint").addHandler(Keep())
logging.getLogger("mint").setLevel(logging.INFO)

def attempt(label, name):
    started = time.monotonic()
    try:
        source = resolve_model(name)
        outcome = {"name": source.name, "path": str(source.path), "origin": source.origin,
                   "revision": source.revision, "note": source.note, "files": sorted(os.listdir(source.path))}
    except mint.errors.MintError as error:
        outcome = {"error": type(error).__name__, "text": str(error)}
    outcomes[label] = outcome | {"seconds": time.monotonic() - started}

def mark(label):
    '''Leave a line in the hub's list of requests.'''
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + label).close()
    except urllib.error.HTTPError:
        pass
"""


@dataclass
class World:
    """A hub with small repositories, and the one cache that all children of this module use in turn."""

    hub: FakeHub
    hf_home: Path
    empty: Path

    def start(self, code: str, endpoint: str = "") -> subprocess.Popen[str]:
        env = child_env(endpoint or self.hub.url, self.hf_home, HF_HUB_DISABLE_PROGRESS_BARS="1")
        program = PRELUDE + textwrap.dedent(code) + "\nprint(json.dumps({'outcomes': outcomes, 'lines': lines}))"
        command = [sys.executable, "-W", "error", "-c", program]
        return subprocess.Popen(command, env=env, cwd=self.empty, text=True, stdout=subprocess.PIPE)

    def run(self, code: str, endpoint: str = "") -> dict[str, Any]:
        child = self.start(code, endpoint)
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
        report: dict[str, Any] = json.loads(output.splitlines()[-1])
        return report


def write_repositories(root: Path) -> None:
    """Weights are a few bytes: nothing here opens them."""
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    config = json.dumps({"model_type": "llama", "vocab_size": 384})
    repositories = {
        "tiny/good": {
            "config.json": config,
            "model.safetensors": "weights",
            "pytorch_model.bin": "pickle",
            "modeling_good.py": "raise SystemExit('code of a repository was run')",
            "consolidated.safetensors": "the same again",
            "onnx/model.safetensors": "another format",
            "README.md": "text",
        },
        "tiny/large": {"config.json": config, "model.safetensors": "0123456789" * 20_000, "tokenizer.json": "{}"},
        "tiny/sharded": {
            "config.json": config,
            "model.safetensors.index.json": index,
            "model-00001-of-00002.safetensors": "one",
            "model-00002-of-00002.safetensors": "two",
        },
        "tiny/half": {
            "config.json": config,
            "model.safetensors.index.json": index,
            "model-00001-of-00002.safetensors": "one",
        },
        "tiny/pickled": {"config.json": config, "pytorch_model.bin": "pickle"},
        "tiny/adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"},
        "tiny/locked": {"config.json": config, "model.safetensors": "secret", "tokenizer.json": "{}"},
        "tiny/piecemeal": {"config.json": config, "model.safetensors": "weights", "tokenizer.json": "{}"},
    }
    for name, files in repositories.items():
        for file, content in files.items():
            path = root / "models" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    write_tiny_tokenizer(root / "models" / "tiny" / "good")
    write_tiny_tokenizer(root / "models" / "tiny" / "sharded")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    top = tmp_path_factory.mktemp("hub")
    write_repositories(top / "root")
    (top / "empty").mkdir()
    with FakeHub(top / "root", gated=["tiny/locked"]) as hub:
        yield World(hub, top / "hf_home", top / "empty")


def incomplete_files(world: World) -> list[Path]:
    return list((world.hf_home / "hub" / "models--tiny--large" / "blobs").glob("*.incomplete"))


@pytest.fixture(scope="module")
def interrupted(world: World) -> World:
    """The state after a process was killed in the middle of downloading tiny/large."""
    world.hub.stall("model.safetensors")
    child = world.start("attempt('large', 'tiny/large')")
    try:
        assert world.hub.stalled.wait(timeout=60), "the child never asked for the weights"
        while not incomplete_files(world):  # the client writes what it has a moment later
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    world.hub.let_go()
    return world


@pytest.fixture(scope="module")
def without_hub(interrupted: World) -> dict[str, Any]:
    """Nothing listens at the endpoint; then something accepts and stays silent; then HF_HUB_OFFLINE."""
    with socket.socket() as silent, socket.socket() as unused:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        code = f"""
            attempt("never seen", "tiny/never")
            attempt("interrupted", "tiny/large")
            attempt("with organisation", "HuggingFaceTB/SmolLM2-135M-Instruct")
            import huggingface_hub.constants as constants
            constants.ENDPOINT = "http://127.0.0.1:{silent.getsockname()[1]}"
            mint.hub.hub_cache.REQUEST_SECONDS = 0.5
            attempt("silent", "tiny/never")
            constants.HF_HUB_OFFLINE = True
            attempt("offline", "tiny/never@main")
        """
        return interrupted.run(code, endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}")


@pytest.fixture(scope="module")
def online(interrupted: World, without_hub: dict[str, Any]) -> dict[str, Any]:
    good = interrupted.hub.root / "models" / "tiny" / "good"
    code = f"""
        import shutil
        from huggingface_hub import hf_hub_download
        os.makedirs("tiny/good")
        Path("tiny/good/config.json").write_text("{{}}")
        Path("tiny/good/model.safetensors").write_text("decoy")
        attempt("good", "tiny/good")
        mark("second")
        attempt("good again", "tiny/good")
        attempt("good at main", "tiny/good@main")
        attempt("good at commit", "tiny/good@{commit_of(good)}")
        mark("third")
        shutil.rmtree("tiny")
        attempt("good at nowhere", "tiny/good@no-such-branch")
        attempt("unknown", "tiny/unknown")
        attempt("locked", "tiny/locked")
        os.environ["HF_TOKEN"] = "hf_wrong"
        attempt("locked, wrong token", "tiny/locked")
        os.environ["HF_TOKEN"] = "hf_test"
        attempt("locked, token", "tiny/locked")
        attempt("unknown, token", "tiny/unknown")
        attempt("resumed", "tiny/large")
        for name in ("sharded", "half", "pickled", "adapter"):
            attempt(name, "tiny/" + name)
        for file in ("config.json", "tokenizer.json"):
            hf_hub_download("tiny/piecemeal", file)
        attempt("piecemeal", "tiny/piecemeal")
        tokenizer = load_tokenizer(resolve_model("tiny/good"))
        ids = tokenizer("What is the capital of France?")["input_ids"]
        outcomes["tokenizer"] = [tokenizer.decode(ids), load_tokenizer("tiny/good").eos_token, len(ids)]
    """
    return interrupted.run(code)


def text_of(report: dict[str, Any], label: str, error: str) -> str:
    outcome = report["outcomes"][label]
    assert outcome.get("error") == error, outcome
    text: str = outcome["text"]
    return text


def test_a_hub_model_is_downloaded_into_the_cache(online: dict[str, Any], world: World) -> None:
    good = online["outcomes"]["good"]
    commit = commit_of(world.hub.root / "models" / "tiny" / "good")
    assert (good["name"], good["origin"], good["revision"]) == ("tiny/good", "hub", commit)
    assert Path(good["path"]) == world.hf_home / "hub" / "models--tiny--good" / "snapshots" / commit
    assert good["note"] == f"from the Hugging Face hub, commit {commit[:12]}"


def test_only_safetensors_configuration_and_tokenizer_are_downloaded(online: dict[str, Any]) -> None:
    assert online["outcomes"]["good"]["files"] == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_what_is_downloaded_is_said(online: dict[str, Any], world: World) -> None:
    said = [line for line in online["lines"] if "tiny/good" in line]
    assert said[1].startswith("downloading tiny/good: 5 files, 0.0 MB, into ")
    assert said[1].endswith(str(world.hf_home / "hub"))
    assert said[2].startswith("downloaded tiny/good in ")


def test_a_folder_of_the_same_name_here_does_not_win_over_the_hub(online: dict[str, Any]) -> None:
    assert (Path(online["outcomes"]["good"]["path"]) / "model.safetensors").read_text() == "weights"
    assert online["lines"][0].endswith("the folder of that name here is not used (write ./tiny/good)")


def test_a_complete_copy_in_the_cache_is_used_without_any_request(online: dict[str, Any], world: World) -> None:
    paths = [path for _, path, _ in world.hub.requests]
    assert paths.index("/mark/third") == paths.index("/mark/second") + 1
    first = online["outcomes"]["good"]
    for label in ("good again", "good at main", "good at commit"):
        again = online["outcomes"][label]
        assert (again["origin"], again["path"], again["revision"]) == ("cache", first["path"], first["revision"])
    assert online["outcomes"]["good at main"]["name"] == "tiny/good@main"
    assert "the hub was not asked for a newer one" in online["outcomes"]["good again"]["note"]


def test_an_unknown_revision_is_named(online: dict[str, Any], world: World) -> None:
    text = text_of(online, "good at nowhere", "ModelNotFoundError")
    assert text.startswith("tiny/good is on the hub but has no revision 'no-such-branch'")
    assert f"{world.hub.url}/tiny/good/tree/main" in text


@pytest.mark.parametrize(("label", "status"), [("unknown", 401), ("unknown, token", 404)])
def test_an_unknown_model_is_not_found_and_perhaps_private(online: dict[str, Any], label: str, status: int) -> None:
    text = text_of(online, label, "ModelNotFoundError")
    assert text.startswith(f"the hub shows no model tiny/unknown (HTTP {status}): either there is none of that name")
    assert "or it is private and needs `hf auth login` or HF_TOKEN" in text
    assert "For something on this machine write ./tiny/unknown" in text


@pytest.mark.parametrize("label", ["locked", "locked, wrong token"])
def test_a_gated_model_says_how_to_get_access(online: dict[str, Any], world: World, label: str) -> None:
    text = text_of(online, label, "ModelAccessError")
    assert text.startswith("the hub does not hand out tiny/locked (HTTP 401): it is gated or private.")
    assert f"Accept its licence at {world.hub.url}/tiny/locked" in text
    assert "`hf auth login` or set HF_TOKEN" in text
    assert "hf_wrong" not in text


def test_a_gated_model_is_downloaded_with_a_token(online: dict[str, Any]) -> None:
    assert online["outcomes"]["locked, token"]["origin"] == "hub"


def test_a_sharded_model_is_downloaded_whole(online: dict[str, Any]) -> None:
    files = online["outcomes"]["sharded"]["files"]
    assert [file for file in files if file.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_repository_that_lacks_a_shard_is_refused(online: dict[str, Any]) -> None:
    text = text_of(online, "half", "ModelNotFoundError")
    assert "'tiny/half' is not a complete model: model-00002-of-00002.safetensors missing" in text


def test_a_repository_of_pickled_weights_is_refused_and_not_downloaded(online: dict[str, Any], world: World) -> None:
    text = text_of(online, "pickled", "ModelNotFoundError")
    assert "it has pickled weights (pytorch_model.bin), which are never loaded" in text
    assert not any("pickled/resolve" in path for _, path, _ in world.hub.requests)


def test_a_repository_with_an_adapter_is_not_a_base_model(online: dict[str, Any]) -> None:
    assert "tiny/adapter on the hub has no config.json: it is a LoRA adapter" in text_of(
        online, "adapter", "ModelNotFoundError"
    )


def test_a_copy_that_other_tools_left_incomplete_is_completed(online: dict[str, Any]) -> None:
    piecemeal = online["outcomes"]["piecemeal"]
    assert (piecemeal["origin"], piecemeal["files"]) == ("hub", ["config.json", "model.safetensors", "tokenizer.json"])


def test_the_tokenizer_of_a_source_and_of_a_name_can_be_loaded(online: dict[str, Any]) -> None:
    assert online["outcomes"]["tokenizer"] == ["What is the capital of France?", "<|im_end|>", 8]


def test_an_interrupted_download_is_not_taken_for_a_model(without_hub: dict[str, Any], world: World) -> None:
    assert incomplete_files(world), "nothing was interrupted"
    assert "tiny/large is not (completely) in the Hugging Face cache" in text_of(
        without_hub, "interrupted", "HubUnreachableError"
    )


def test_an_interrupted_download_is_finished_by_the_next_call(online: dict[str, Any], world: World) -> None:
    resumed = online["outcomes"]["resumed"]
    assert resumed["origin"] == "hub"
    assert (Path(resumed["path"]) / "model.safetensors").read_text() == "0123456789" * 20_000


@pytest.mark.parametrize("label", ["never seen", "interrupted", "silent", "offline"])
def test_without_a_hub_the_error_comes_within_seconds_and_names_the_ways_out(
    without_hub: dict[str, Any], label: str
) -> None:
    text = text_of(without_hub, label, "HubUnreachableError")
    assert without_hub["outcomes"][label]["seconds"] < 10
    for way_out in (
        "check the network and proxy settings",
        "set HF_ENDPOINT to a mirror you can reach",
        "give a local folder",
        "the packaged model 'SmolLM2-135M-Instruct'",
    ):
        assert way_out in text


def test_a_packaged_name_with_an_organisation_means_the_hubs_own_model(without_hub: dict[str, Any]) -> None:
    text = text_of(without_hub, "with organisation", "HubUnreachableError")
    assert text.startswith("HuggingFaceTB/SmolLM2-135M-Instruct is not (completely) in the Hugging Face cache")


def test_the_reason_why_the_hub_is_not_used_is_given(without_hub: dict[str, Any]) -> None:
    refused = text_of(without_hub, "never seen", "HubUnreachableError")
    assert "the hub at http://127.0.0.1:" in refused and "does not answer ([Errno 111] Connection refused)" in refused
    assert "does not answer (timed out)" in text_of(without_hub, "silent", "HubUnreachableError")
    assert "HF_HUB_OFFLINE is set" in text_of(without_hub, "offline", "HubUnreachableError")


def test_a_question_that_hangs_is_given_up_at_the_deadline() -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: time.sleep(1))


def test_an_error_in_the_asking_thread_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)

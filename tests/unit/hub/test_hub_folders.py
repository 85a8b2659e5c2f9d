"""Local folders and the forms of names: what is a model, what is refused and with which words. No network, no cache."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mint.errors import ModelNotFoundError
from mint.hub import LocalModel, local_model, resolve_model


def write_model_files(folder: Path, *names: str) -> Path:
    """A folder that looks like a model; contents do not matter here."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def write_index(folder: Path, *files: str) -> None:
    weight_map = {f"weight.{number}": file for number, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(name: str) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(name)
    return str(caught.value)


def test_importing_the_package_loads_no_heavy_module() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "gguf", "tokenizers")
    code = f"import sys, mint.hub; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_absolute_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = write_model_files(tmp_path / "model", "config.json", "model.safetensors")
    source = resolve_model(str(folder))
    assert (source.name, source.path, source.origin, source.revision) == (str(folder), folder, "folder", None)
    assert source.note == f"local folder {folder}"


@pytest.mark.parametrize("name", ["./owner/model", "../here/owner/model", "owner/model/", "owner/../owner/model"])
def test_paths_that_are_not_owner_slash_name_are_folders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model_files(tmp_path / "here" / "owner" / "model", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_model(name).path == folder


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_files(tmp_path / "mine", "config.json", "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine").path == folder


def test_a_sharded_model_is_complete_with_all_its_shards_only(tmp_path: Path) -> None:
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    folder = write_model_files(tmp_path, "config.json", *shards[:2])
    write_index(folder, *shards)
    assert refusal(str(folder)) == f"{str(folder)!r} is not a complete model: {shards[2]} missing in {folder}"
    write_model_files(folder, shards[2])
    assert resolve_model(str(folder)).path == folder


@pytest.mark.parametrize("file", ["../weights.safetensors", "/etc/weights.safetensors", "weights.bin"])
def test_an_index_that_leads_out_of_its_folder_or_to_a_pickle_is_refused(file: str, tmp_path: Path) -> None:
    write_model_files(tmp_path, "config.json")
    write_index(tmp_path, file)
    text = refusal(str(tmp_path))
    assert f"lists {file!r}; only *.safetensors files in the same folder are loaded" in text


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'])
def test_an_index_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    write_model_files(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json cannot be read as an index of weight files" in refusal(str(tmp_path))


def test_missing_folder_says_so(tmp_path: Path) -> None:
    text = refusal(str(tmp_path / "nowhere"))
    assert text.startswith(f"there is no folder {str(tmp_path / 'nowhere')!r}")
    assert "as owner/name" in text


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file; give the folder that holds config.json and *.safetensors" in refusal(
        str(tmp_path / "model.gguf")
    )


def test_empty_folder_names_both_missing_files(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == (
        f"{str(tmp_path)!r} is not a complete model: config.json, model.safetensors missing in {tmp_path}. "
        "It holds no files; weights are loaded from *.safetensors only"
    )


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    write_model_files(tmp_path, "config.json", "pytorch_model.bin")
    text = refusal(str(tmp_path))
    assert "model.safetensors missing" in text
    assert "It has pickled weights (pytorch_model.bin), which can run code when they are opened" in text
    assert "get the model as *.safetensors" in text


def test_an_adapter_folder_is_recognised(tmp_path: Path) -> None:
    write_model_files(tmp_path, "adapter_config.json", "adapter_model.safetensors")
    assert "holds a LoRA adapter (adapter_config.json), not a base model" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["gpt2", "a/b/c", "smollm2-135m-instruct", "SmolLM2-135M-Instruct@main", "", " ", "a\0b"]
)
def test_a_name_of_no_known_form_lists_the_forms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = refusal(name)
    assert repr(name) in text
    assert "owner/name or owner/name@revision on the Hugging Face hub (e.g. Qwen/Qwen3-0.6B)" in text
    assert "a packaged model (SmolLM2-135M-Instruct)" in text


@pytest.mark.parametrize(
    "name", ["../owner/model", "../../SmolLM2-135M-Instruct", "/SmolLM2-135M-Instruct", "~nobody-of-that-name/model"]
)
def test_names_with_dots_and_slashes_stay_folders_and_never_reach_cache_or_package(name: str, tmp_path: Path) -> None:
    assert refusal(name).startswith("there is no folder")


@pytest.mark.parametrize("name", ["a--b/c", "owner/model..x", "owner/model.git", "owner/" + "x" * 100])
def test_names_that_the_hub_forbids_are_refused_without_asking_it(name: str) -> None:
    assert refusal(name).startswith(f"{name!r} cannot be the name of a model on the hub: ")


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "",
        "a\0b",
        "../owner/model",
        "~nobody-of-that-name/model",
        "a--b/c",
        "owner/model.git",
        "owner/model@a//b",
    ],
)
def test_a_name_that_is_refused_is_refused_when_it_is_only_looked_for(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        local_model(name)
    assert str(caught.value) == refusal(name)


def test_a_folder_is_found_with_or_without_weights_but_not_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json, model\.safetensors missing"):
        local_model(str(tmp_path))
    folder = write_model_files(tmp_path, "config.json")
    assert local_model(str(folder)) == LocalModel(folder, ("model.safetensors",))
    write_model_files(folder, "model.safetensors")
    assert local_model(str(folder)) == LocalModel(folder, ())


@pytest.mark.parametrize("revision", ["", "../main", "a/../b", "/main", "a//b", ".hidden", "a b", "main\n", "a/"])
def test_revisions_that_could_leave_the_cache_are_refused(revision: str) -> None:
    assert refusal(f"owner/model@{revision}") == (
        f"{revision!r} in {f'owner/model@{revision}'!r} cannot be a revision; "
        "give a branch, tag, commit or refs/pr/NUMBER after the @"
    )


def test_a_folder_named_like_a_published_model_is_not_used_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_model_files(tmp_path / "owner" / "model", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="mint"):
        refusal("owner/model@..")  # refused for its revision, so that nothing is asked of the hub here
    assert caplog.messages == [
        "owner/model names a published model; the folder of that name here is not used (write ./owner/model)"
    ]

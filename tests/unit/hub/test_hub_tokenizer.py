"""Loading tokenizers from model folders: what is loaded, what is refused, and that no code in a folder is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.tiny_models import write_tiny_tokenizer

from mint.errors import ModelNotFoundError
from mint.hub import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that resolves (its weights are never opened here) and has a tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "model.safetensors").touch()
    return write_tiny_tokenizer(tmp_path)


def test_special_tokens_and_template_are_those_of_the_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == (folder / "chat_template.jinja").read_text()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode(tokenizer("<|im_start|>user\nHi é")["input_ids"]) == "<|im_start|>user\nHi é"


def test_a_model_without_tokenizer_names_the_files_that_were_looked_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(f"{str(folder)!r} has no tokenizer in {folder} (looked for tokenizer.json, ")


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab"')
    with pytest.raises(ModelNotFoundError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(f"the tokenizer of {str(folder)!r} in {folder} cannot be loaded: ")


def add_tokenizer_code(folder: Path) -> Path:
    """Tell transformers that the tokenizer's class is in the folder; returns the file that appears if it is run."""
    ran = folder / "the code was run"
    (folder / "tokenization_own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass OwnTokenizer: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "OwnTokenizer"
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ran


def test_code_in_the_folder_of_a_known_architecture_is_not_run(folder: Path) -> None:
    ran = add_tokenizer_code(folder)
    assert load_tokenizer(str(folder)).eos_token == "<|im_end|>"
    assert not ran.exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused_without_a_question(folder: Path) -> None:
    ran = add_tokenizer_code(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    with pytest.raises(ModelNotFoundError) as caught:
        load_tokenizer(str(folder))
    assert "cannot be loaded" in str(caught.value)
    assert "trust_remote_code" in str(caught.value)
    assert not ran.exists()

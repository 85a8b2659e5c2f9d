"""What makes a folder a base model that can be loaded, and the errors that say what is missing."""

from __future__ import annotations

import json
from pathlib import Path

from mint.errors import ModelNotFoundError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_PARTS = (  # what a tokenizer may have besides
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def missing_model_files(folder: Path) -> list[str]:
    """Names of the files without which the model in `folder` cannot be loaded; empty when it is complete.

    Weights are either `model.safetensors` or every file that `model.safetensors.index.json` lists.
    Raises ModelNotFoundError if that index cannot be read or points out of the folder.
    """
    wanted = [CONFIG]
    if (folder / WEIGHTS_INDEX).is_file():
        wanted += _indexed_files(folder / WEIGHTS_INDEX)
    else:
        wanted.append(WEIGHTS)
    return [name for name in wanted if not (folder / name).is_file()]


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in `folder` that make up its tokenizer, chat template included."""
    return [folder / name for name in (*TOKENIZERS, *TOKENIZER_PARTS) if (folder / name).is_file()]


def require_model_folder(folder: Path, name: str) -> None:
    """Raise ModelNotFoundError, saying what is missing, unless `folder` holds a complete model of safetensors.

    name: how the user called it, for the message.
    """
    if folder.is_file():
        raise ModelNotFoundError(f"{name!r} is a file; give the folder that holds {CONFIG} and *.safetensors")
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"there is no folder {str(folder)!r} (asked for as {name!r}); give an existing model folder, "
            "or a model of the Hugging Face hub as owner/name"
        )
    missing = missing_model_files(folder)
    if not missing:
        return
    if CONFIG in missing and (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"{name!r} holds a LoRA adapter (adapter_config.json), not a base model; "
            "give the base model it was trained on"
        )
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    raise ModelNotFoundError(
        f"{name!r} is not a complete model: {', '.join(missing)} missing in {folder}{_hint(found)}"
    )


def pickled_weights(files: list[str]) -> list[str]:
    """Those of `files` that are pickled weights: opening one can run any code, so MinT never does."""
    return [name for name in files if name.endswith(PICKLES)]


def _hint(found: list[str]) -> str:
    if any(name.endswith(".safetensors") for name in found):
        return ""
    if pickles := pickled_weights(found):
        return (
            f". It has pickled weights ({', '.join(pickles[:3])}), which can run code when they are opened and are "
            "never loaded: get the model as *.safetensors, or convert it where you trust it "
            "(transformers: from_pretrained, then save_pretrained)"
        )
    return f". It holds {', '.join(found[:5]) or 'no files'}; weights are loaded from *.safetensors only"


def _indexed_files(index: Path) -> list[str]:
    """The distinct weight files of an index, sorted."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(
            f"{index} cannot be read as an index of weight files ({error!r}); fetch or save the model again"
        ) from error
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelNotFoundError(
                f"{index} lists {name!r}; only *.safetensors files in the same folder are loaded. "
                "Fetch or save the model again"
            )
    return names

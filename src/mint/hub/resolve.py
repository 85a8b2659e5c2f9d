"""From the name of a base model to its files, and to its tokenizer."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mint.errors import ModelNotFoundError
from mint.hub.folders import CONFIG, TOKENIZERS, has_tokenizer, missing_model_files, require_model_folder
from mint.hub.hub_cache import cached_model, hub_source
from mint.hub.package_files import PACKAGED_MODELS
from mint.hub.packaged import is_converted, packaged_source
from mint.hub.source import LocalModel, ModelSource
from mint.settings import Settings
from mint.settings import load as load_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mint")

HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>.*))?", re.ASCII | re.DOTALL)


def resolve_model(name: str, *, settings: Settings | None = None) -> ModelSource:
    """Find the base model `name`, fetching it if it is not on this machine. `settings`: None reads the environment.

    What a name means depends on its form alone, never on what happens to lie in the current folder:

    - `./x`, `../x`, `/x`, `~/x`, or a path that is not of the form owner/name: a local model folder with config.json
      and *.safetensors.
    - a name of PACKAGED_MODELS, e.g. `SmolLM2-135M-Instruct`: the model in the Python package; fetched with pip and
      converted into MINT_HOME/models on first use.
    - `owner/name` or `owner/name@revision`: a model of the Hugging Face hub; a complete copy in its cache is used
      without any network (and without looking for a newer commit), else *.safetensors, configuration and tokenizer
      are downloaded. HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and proxies work as everywhere.

    Raises ModelNotFoundError (no such model, or incomplete, or pickled weights only), ModelAccessError (gated or
    private), HubUnreachableError (a download is needed and impossible; from the hub within seconds, from pip when it
    gives up), MissingExtraError (packaged model without `gguf` or pip), InputError (an unusable MINT_* variable).
    """
    _check_name(name)
    if name in PACKAGED_MODELS:
        _warn_of_unused_folder(name)
        return packaged_source(name, settings or load_settings())
    if match := HUB_NAME.fullmatch(name):
        _warn_of_unused_folder(match["repo"])
        return hub_source(name, match["repo"], match["revision"])
    return _folder_source(name)


def local_model(name: str, *, settings: Settings | None = None) -> LocalModel | None:
    """What of the base model `name` is on this machine, weights or not; None: nothing. Nothing is fetched.

    Names mean what they mean to `resolve_model`. Raises ModelNotFoundError for a name of no such form, and for a folder
    without config.json.
    """
    _check_name(name)
    if name in PACKAGED_MODELS:
        folder = (settings or load_settings()).models_dir / name
        return LocalModel(folder, ()) if is_converted(folder, PACKAGED_MODELS[name]) else None
    if match := HUB_NAME.fullmatch(name):
        return cached_model(name, match["repo"], match["revision"])
    folder = _named_folder(name)
    if not (folder / CONFIG).is_file():
        require_model_folder(folder, name)
    return LocalModel(folder.resolve(), tuple(missing_model_files(folder)))


def load_tokenizer(source: ModelSource | str) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of a base model (a name is resolved first). Code in model folders is never run.

    Raises what `resolve_model` does, and ModelNotFoundError if there is no tokenizer or it cannot be loaded.
    """
    if isinstance(source, str):
        source = resolve_model(source)
    if not has_tokenizer(source.path):
        raise ModelNotFoundError(
            f"{source.name!r} has no tokenizer in {source.path} (looked for {', '.join(TOKENIZERS)}); "
            "copy the tokenizer's files there, or choose a model that has them"
        )
    from transformers import AutoTokenizer

    try:
        # False, not left out: left out, transformers asks on the terminal whether to run code that it finds
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ModelNotFoundError(
            f"the tokenizer of {source.name!r} in {source.path} cannot be loaded: {error}"
        ) from error
    return tokenizer


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ModelNotFoundError(f"{name!r} is not the name of a base model; {_allowed()}")


def _folder_source(name: str) -> ModelSource:
    folder = _named_folder(name)
    require_model_folder(folder, name)
    folder = folder.resolve()
    return ModelSource(name, folder, "folder", None, f"local folder {folder}")


def _named_folder(name: str) -> Path:
    folder = Path(os.path.expanduser(name))  # unlike Path's, leaves the ~ of an unknown user alone
    if not folder.exists() and not name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no base model {name!r}: no folder of that name, and {_allowed()}")
    return folder


def _warn_of_unused_folder(name: str) -> None:
    if Path(name).is_dir():
        logger.warning("%s names a published model; the folder of that name here is not used (write ./%s)", name, name)


def _allowed() -> str:
    return (
        "allowed are owner/name or owner/name@revision on the Hugging Face hub (e.g. Qwen/Qwen3-0.6B), "
        f"a local folder (e.g. ./my-model), or a packaged model ({', '.join(sorted(PACKAGED_MODELS))})"
    )

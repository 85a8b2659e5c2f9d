"""Models of the Hugging Face hub: from its local cache when complete, else downloaded into it.

The hub's client retries an endpoint that does not answer for 25 to 50 seconds per call, so the first question (which
files has this model?) is asked once, with a deadline, and only then is anything downloaded.
"""

from __future__ import annotations

import fnmatch
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from mint.errors import DataError, HubUnreachableError, MintError, ModelAccessError, ModelNotFoundError
from mint.hub.folders import CONFIG, has_tokenizer, missing_model_files, pickled_weights, require_model_folder
from mint.hub.source import LocalModel, ModelSource

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

logger = logging.getLogger("mint")
T = TypeVar("T")

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
# Sub-folders hold other formats (onnx/, original/); Mistral's consolidated files are the same weights again.
UNWANTED = ["*/*", "consolidated*"]

# Seconds for connecting and for each read; and for the whole first question, because neither a slow name server nor
# trying the addresses of a host one after another counts towards the first number.
REQUEST_SECONDS = 4.0
ANSWER_SECONDS = 8.0

WITHOUT_HUB = {
    "model": "give a local folder that holds config.json, *.safetensors and the tokenizer; or use the packaged model "
    "'SmolLM2-135M-Instruct', which needs no hub",
    "dataset": "give a JSON Lines file with 'messages' a line; or use the data set 'packaged', which needs no hub",
}

# A branch, a tag, a commit or refs/pr/N: parts that begin with a letter, digit or _, joined by single slashes.
REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)


def hub_source(name: str, repo: str, revision: str | None) -> ModelSource:
    """The model `repo` (owner/name) at `revision` (None: its main branch), as `resolve_model` describes.

    A complete copy in the cache is used without asking the hub whether it has a newer one.
    """
    _check_address(name, repo, revision)
    cached = _complete_snapshot(repo, revision)
    if cached is not None:
        note = f"from the Hugging Face cache, commit {cached.name[:12]}; the hub was not asked for a newer one"
        return ModelSource(name, cached, "cache", cached.name, note)
    info = _ask_hub(name, repo, revision)
    _announce(name, repo, info)
    started = time.monotonic()
    folder = _download(name, repo, revision)
    logger.info("downloaded %s in %.0f s", name, time.monotonic() - started)
    require_model_folder(folder, name)
    return ModelSource(name, folder, "hub", folder.name, f"from the Hugging Face hub, commit {folder.name[:12]}")


def cached_model(name: str, repo: str, revision: str | None) -> LocalModel | None:
    """What of the model is in the cache, its configuration at least; else None. No network."""
    from huggingface_hub import try_to_load_from_cache

    _check_address(name, repo, revision)
    found = try_to_load_from_cache(repo, CONFIG, revision=revision)
    if not isinstance(found, str):  # not there, or known not to exist
        return None
    folder = Path(found).parent
    return LocalModel(folder, tuple(missing_model_files(folder)))


def _check_address(name: str, repo: str, revision: str | None) -> None:
    """Both become parts of a path in the cache, so nothing that could lead out of it goes on."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # there, not declared as exported

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelNotFoundError(f"{name!r} cannot be the name of a model on the hub: {error}") from error
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200):
        raise ModelNotFoundError(
            f"{revision!r} in {name!r} cannot be a revision; give a branch, tag, commit or refs/pr/NUMBER after the @"
        )


def _complete_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder in the cache if it holds all of the model, else None. No network.

    The client knows what an interrupted download of its own lacks; a copy that other tools left there piece by piece
    (it has no list of the repository's files) must at least have the configuration, all weights and a tokenizer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    return None if missing_model_files(folder) or not has_tokenizer(folder) else folder


def _ask_hub(name: str, repo: str, revision: str | None) -> ModelInfo:
    """What the hub says about the repository; raises within ANSWER_SECONDS when it says nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    def ask() -> ModelInfo:
        return HfApi(library_name="mint").model_info(
            repo, revision=revision, timeout=REQUEST_SECONDS, files_metadata=True
        )

    try:
        return within(ANSWER_SECONDS, ask)
    except (http_error(), OfflineModeIsEnabled, TimeoutError, ValueError) as error:  # ValueError: not JSON, not a hub
        raise explained(error, name, repo, revision) from error


def within(seconds: float, question: Callable[[], T]) -> T:
    """The answer to `question`, or TimeoutError. A thread, because the look-up of a host name cannot be interrupted."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # not handled here: it is raised in the caller's thread
            answer.set_exception(error)

    threading.Thread(target=run, name="mint-ask-hub", daemon=True).start()
    try:
        return answer.result(timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error


def _announce(name: str, repo: str, info: ModelInfo) -> None:
    """Log what will be downloaded; refuse a repository that cannot be a base model before anything is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = [file for file in sizes if _matches(file, WANTED) and not _matches(file, UNWANTED)]
    if not any(file.endswith(".safetensors") for file in wanted):
        pickles = pickled_weights(list(sizes))
        reason = (
            f"it has pickled weights ({', '.join(pickles[:3])}), which are never loaded" if pickles else "none there"
        )
        raise ModelNotFoundError(
            f"{repo} on the hub cannot be used: weights are loaded from *.safetensors only, and {reason}. "
            "Choose a repository that publishes *.safetensors"
        )
    if CONFIG not in wanted:
        kind = "a LoRA adapter" if "adapter_config.json" in sizes else "not a transformers model"
        raise ModelNotFoundError(f"{repo} on the hub has no {CONFIG}: it is {kind}. Give the name of a base model")
    megabytes = sum(sizes[file] for file in wanted) / 1e6
    logger.info("downloading %s: %d files, %.1f MB, into %s", name, len(wanted), megabytes, HF_HUB_CACHE)


def _matches(file: str, patterns: list[str]) -> bool:
    """As `snapshot_download` filters: `*` matches slashes too."""
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _download(name: str, repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo, revision=revision, library_name="mint", allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except (http_error(), LocalEntryNotFoundError) as error:
        raise explained(error, name, repo, revision) from error
    return Path(found)


def http_error() -> type[Exception]:
    """The common base of all errors of the hub client's HTTP library, whichever library its version uses."""
    from huggingface_hub import errors

    base: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # imported there, not declared as exported
    return base


def explained(
    error: Exception, name: str, repo: str, revision: str | None, kind: Literal["model", "dataset"] = "model"
) -> MintError:
    """Our error for one of the hub client's."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    unknown = isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError)
    if isinstance(error, errors.DisabledRepoError):
        return ModelAccessError(f"{name} has been disabled on the hub ({page}); choose another {kind}")
    if isinstance(error, errors.GatedRepoError) or (status in (401, 403) and not unknown):
        return ModelAccessError(
            f"the hub does not hand out {name} (HTTP {status}): it is gated or private. Accept its licence at {page}, "
            "then log in with `hf auth login` or set HF_TOKEN to a token of an account that may read it. "
            f"The hub says: {_words(error)}"
        )
    if unknown:
        return (DataError if kind == "dataset" else ModelNotFoundError)(
            f"the hub shows no {kind} {repo} (HTTP {status}): either there is none of that name (check owner, spelling "
            f"and capitals at {page}), or it is private and needs `hf auth login` or HF_TOKEN. "
            f"For something on this machine write ./{repo}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo} is on the hub but has no revision {revision or 'main'!r}; "
            f"its branches, tags and commits are listed at {page}/tree/main"
        )
    return HubUnreachableError(_no_hub_message(error, name, status, kind))


def _no_hub_message(error: Exception, name: str, status: int | None, kind: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set, so the hub may not be asked"
    elif status is not None:
        reason = f"the hub at {constants.ENDPOINT} answers with an error (HTTP {status})"
    else:
        reason = f"the hub at {constants.ENDPOINT} does not answer ({_words(error)})"
    return (
        f"{name} is not (completely) in the Hugging Face cache {constants.HF_HUB_CACHE}, and {reason}. Either: check "
        f"the network and proxy settings; or set HF_ENDPOINT to a mirror you can reach; or {WITHOUT_HUB[kind]}. "
        "Files that arrived whole before an interruption are kept"
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Files of a data set on the Hugging Face hub: from its local cache when complete, else downloaded into it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from mint.hub.hub_cache import ANSWER_SECONDS, REQUEST_SECONDS, explained, http_error, within

logger = logging.getLogger("mint")

SHARD = re.compile(r"-(\d+)-of-(\d+)\.")


def dataset_files(repo: str, patterns: Mapping[str, str]) -> dict[str, list[Path]]:
    """The files of each split of `repo` (owner/name), in order. `patterns`: split -> glob, e.g. "data/train-*.parquet".

    A complete copy in the cache is used without asking the hub. Raises DataError, ModelAccessError or, within seconds,
    HubUnreachableError.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = list(patterns.values())
    try:
        folder = snapshot_download(repo, repo_type="dataset", local_files_only=True, allow_patterns=wanted)
        files = _files(Path(folder), patterns)
        if all(map(_complete, files.values())):
            return files
    except LocalEntryNotFoundError:
        pass  # nothing of it is in the cache
    try:
        api = HfApi(library_name="mint")
        within(ANSWER_SECONDS, lambda: api.dataset_info(repo, timeout=REQUEST_SECONDS))
        logger.info("downloading the data set %s", repo)
        folder = snapshot_download(repo, repo_type="dataset", library_name="mint", allow_patterns=wanted)
    except (http_error(), OfflineModeIsEnabled, LocalEntryNotFoundError, TimeoutError, ValueError) as error:
        raise explained(error, repo, repo, None, "dataset") from error
    return _files(Path(folder), patterns)


def _files(folder: Path, patterns: Mapping[str, str]) -> dict[str, list[Path]]:
    return {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}


def _complete(files: list[Path]) -> bool:
    """Whether every shard that the names speak of is there."""
    shards = [match for file in files if (match := SHARD.search(file.name))]
    return bool(files) and all(len(files) == int(match[2]) for match in shards)

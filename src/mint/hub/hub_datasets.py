"""Files of a data set on the Hugging Face hub: from its local cache when complete, else downloaded into it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mint.errors import DataError
from mint.hub.downloads import replacing
from mint.hub.hub_cache import ANSWER_SECONDS, REQUEST_SECONDS, REVISION, explained, http_error, within
from mint.settings import Settings

logger = logging.getLogger("mint")

SHARD = re.compile(r"-(\d+)-of-(\d+)\.")


@dataclass(frozen=True, slots=True)
class HubListing:
    """What a data set repository holds. configs: as its card's header says (config_name, data_files); may be empty."""

    repo: str
    commit: str
    files: list[str]
    configs: list[dict[str, Any]]


def dataset_files(repo: str, patterns: Mapping[str, str]) -> dict[str, list[Path]]:
    """The files of each split of `repo` (owner/name), in order. `patterns`: split -> glob, e.g. "data/train-*.parquet".

    A complete copy in the cache is used without asking the hub. Raises DataError, ModelAccessError or, within seconds,
    HubUnreachableError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = list(patterns.values())
    try:
        folder = snapshot_download(repo, repo_type="dataset", local_files_only=True, allow_patterns=wanted)
        files = _files(Path(folder), patterns)
        if all(map(_complete, files.values())):
            return files
    except LocalEntryNotFoundError:
        pass  # nothing of it is in the cache
    _dataset_info(repo, None)
    return _files(_download(repo, None, wanted), patterns)


def listed_dataset_files(
    repo: str, revision: str | None, choose: Callable[[HubListing], Iterable[str]], settings: Settings
) -> tuple[Path, HubListing]:
    """The folder with those files of `repo` (owner/name) that `choose` picks of its listing, and the listing.

    The listing is kept in MINT_HOME: where the cache holds the chosen files of that commit, the hub is not asked again.
    Raises what `choose` does, DataError, ModelAccessError or, within seconds, HubUnreachableError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200):
        raise DataError(
            f"{revision!r} in {repo}@{revision} cannot be a revision; give a branch, tag, commit or refs/pr/N"
        )
    kept = settings.datasets_dir / "hub" / f"{repo}@{revision or 'main'}.json".replace("/", "--")
    listing = _kept_listing(kept)
    if listing is not None:
        chosen = list(choose(listing))
        try:
            folder = Path(
                snapshot_download(
                    repo, revision=listing.commit, repo_type="dataset", local_files_only=True, allow_patterns=chosen
                )
            )
            if all((folder / file).is_file() for file in chosen):
                return folder, listing
        except LocalEntryNotFoundError:
            pass  # the cache was emptied
    info = _dataset_info(repo, revision)
    files = sorted(file.rfilename for file in info.siblings or [])
    card = getattr(info, "card_data", None)
    listing = HubListing(repo, str(info.sha), files, _configs(card.to_dict() if card is not None else {}))
    folder = _download(repo, listing.commit, list(choose(listing)))
    with settings.writing(f"keeping the list of files of {repo}", kept), replacing(kept) as file:
        file.write(json.dumps(asdict(listing)).encode())
    return folder, listing


def matching(files: Iterable[str], pattern: str) -> list[str]:
    """As the hub's cards mean it: `*` and `?` stop at a slash, `**` does not."""
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    expression = re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))
    return [file for file in files if expression.fullmatch(file)]


def _kept_listing(path: Path) -> HubListing | None:
    try:
        return HubListing(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # none yet, or not ours: ask the hub


def _configs(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = card.get("configs")
    return [dict(c) for c in found if isinstance(c, Mapping) and c.get("data_files")] if isinstance(found, list) else []


def _dataset_info(repo: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = HfApi(library_name="mint")
    try:
        return within(ANSWER_SECONDS, lambda: api.dataset_info(repo, revision=revision, timeout=REQUEST_SECONDS))
    except (http_error(), OfflineModeIsEnabled, TimeoutError, ValueError) as error:
        raise explained(error, repo, repo, revision, "dataset") from error


def _download(repo: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    logger.info("downloading the data set %s", repo)
    try:
        return Path(
            snapshot_download(repo, revision=revision, repo_type="dataset", library_name="mint", allow_patterns=wanted)
        )
    except (http_error(), OfflineModeIsEnabled, LocalEntryNotFoundError, TimeoutError, ValueError) as error:
        raise explained(error, repo, repo, revision, "dataset") from error


def _files(folder: Path, patterns: Mapping[str, str]) -> dict[str, list[Path]]:
    return {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}


def _complete(files: list[Path]) -> bool:
    """Whether every shard that the names speak of is there."""
    shards = [match for file in files if (match := SHARD.search(file.name))]
    return bool(files) and all(len(files) == int(match[2]) for match in shards)

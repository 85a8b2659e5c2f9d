"""The chat set "chitchat": people talking with each other, from a Python package, cleaned once into MINT_HOME.

Informal and noisy: good for the tone of small talk and for long conversations, bad for facts.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mint.hub import CHITCHAT, package_file, replacing
from mint.settings import Settings

logger = logging.getLogger("mint")

CLEANING = 1  # counts the changes of the rules below; part of the file's name
MIN_TURNS = 4
# Whole words. A conversation with one of them is left out, as is one with a mail address or a phone number.
PROFANITY = re.compile(
    r"\b(?:(?:mother)?fuck\w*|(?:bull)?shit\w*|bitch\w*|ass(?:es|holes?)?|bastards?|cocks?|cunts?|damn(?:ed|it)?|dicks?"
    r"|fag(?:got)?s?|hell|nigg(?:er|a)s?|nudes?|piss(?:ed)?|porn\w*|pussy|rap(?:e|ed|ist)|retard(?:ed|s)?|sex(?:y|ual)?"
    r"|sluts?|tits|whores?|wtf)\b",
    re.IGNORECASE,
)
PRIVATE = re.compile(r"[\w.+-]+@[\w-]+\.\w+|(?<![\d.])\(?\d{3}\)?[-. ]?\d{3}[-. ]?\d{4}\b")

Turn = tuple[str, str]  # sender, text


def chitchat_file(settings: Settings) -> Path:
    """JSON Lines with `messages`; made on first use. The second speaker of a conversation is the assistant.

    Raises HubUnreachableError where the package cannot be fetched, MissingExtraError without pip.
    """
    path = settings.datasets_dir / f"chitchat-{CHITCHAT.version}-{CLEANING}.jsonl"
    if not path.is_file():
        with settings.writing("preparing the data set chitchat", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".chitchat-", dir=path.parent) as work:
                source = package_file(CHITCHAT, settings.downloads_dir, Path(work) / "dataset.json")
                conversations = json.loads(source.read_text(encoding="utf-8"))
            rows = [row for found in conversations.values() if (row := cleaned(found)) is not None]
            with replacing(path) as file:
                file.writelines(json.dumps({"messages": row}, ensure_ascii=False).encode() + b"\n" for row in rows)
        logger.info("chitchat: %s of %s conversations kept, in %s", f"{len(rows):,}", f"{len(conversations):,}", path)
    return path


def cleaned(conversation: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a conversation of the package, or None where it is left out: two people, at least MIN_TURNS turns
    after joining what one of them wrote in a row, no profanity, no mail address and no phone number."""
    turns: list[Turn] = []
    for utterances in conversation["messages"]:
        text = " ".join(text for utterance in utterances if (text := utterance["text"].strip()))
        if not text:
            continue
        sender = utterances[0]["sender"]
        if turns and turns[-1][0] == sender:
            turns[-1] = sender, f"{turns[-1][1]} {text}"
        else:
            turns.append((sender, text))
    if len({sender for sender, _ in turns}) != 2 or len(turns) < MIN_TURNS:
        return None
    if any(PROFANITY.search(text) or PRIVATE.search(text) for _, text in turns):
        return None
    first = turns[0][0]
    return [{"role": "user" if sender == first else "assistant", "content": text} for sender, text in turns]

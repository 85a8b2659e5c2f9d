"""Contents with whitespace at their borders or with the text of control tokens, where a template in one text goes wrong.

What holds for every family: an answer is trained after exactly the sampler's prompt, every answer once, and the text of
a message gives no control token.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.chat_cases import FEATURES, reference_ids
from tests.unit.chat.conversations import all_tokens, all_weights, chat, trained_runs
from tests.unit.chat.tiny_tokenizers import ALL_FAMILIES, tokenizer_of

from mint.chat import conversation_to_datums, get_renderer

SPACED = chat("  padded \n", "\n\n1. one  \n", "\tmore?", " 2. two\n\n")
BYTE_LEVEL = [name for name, family in ALL_FAMILIES.items() if family.vocabulary == "bytes"]


def attack(name: str) -> str:
    """Ends the turn, and spells every control token."""
    family = ALL_FAMILIES[name]
    return f"x{family.end_of_turn}\ny" + "".join(family.specials) + "z"


def control_tokens(tokenizer: Any, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("name", ALL_FAMILIES)
@pytest.mark.parametrize("kind", ["spaced", "control text"])
def test_every_answer_is_trained_once_after_the_samplers_prompt(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(name)
    messages = SPACED if kind == "spaced" else chat(attack(name), attack(name), "Hello", attack(name))
    renderer = get_renderer(tokenizer)
    found = []
    for datum in conversation_to_datums(messages, renderer, 4096):
        tokens, weights = all_tokens(datum), all_weights(datum)
        for run in trained_runs(tokens, weights):
            index = 1 + 2 * len(found)
            prompt = renderer.prompt(messages[:index])
            assert tokens[: len(prompt)] == prompt
            assert run[-1] in renderer.stop_token_ids and not set(run[:-1]) & set(renderer.stop_token_ids)
            assert tokens[len(prompt) : len(prompt) + len(run)] == run
            found.append(renderer.parse(run).content)
    expected = [messages[1]["content"], messages[3]["content"]]
    assert [text.strip() for text in found] == [text.strip() for text in expected]
    if kind == "control text":
        assert found == expected


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_control_text_gives_the_control_tokens_of_harmless_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    renderer = get_renderer(tokenizer)
    system = "system" in FEATURES[ALL_FAMILIES[name].template or name]
    harmless = chat("a", "b", "c", system="s" if system else None)
    harmful = [{**message, "content": attack(name)} for message in harmless]
    prompt = renderer.prompt(harmful)
    assert control_tokens(tokenizer, prompt) == control_tokens(tokenizer, renderer.prompt(harmless))
    naive = reference_ids(ALL_FAMILIES[name].template or name, tokenizer, harmful, None, as_prompt=True)
    assert len(control_tokens(tokenizer, naive)) > len(control_tokens(tokenizer, prompt))  # the trap
    if name in BYTE_LEVEL:  # the text is the same, written in other tokens
        assert tokenizer.decode(prompt) == tokenizer.decode(naive)


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "qwen3_instruct_2507", "lfm2_v2"])
def test_an_answer_that_begins_with_a_newline_is_not_what_the_template_gives_in_one_text(name: str) -> None:
    """The header's newline and the answer's would be one token, which the sampler's prompt does not end with."""
    tokenizer = tokenizer_of(name)
    messages = chat("List.", "\n\n1. one")
    prompt = get_renderer(tokenizer).prompt(messages[:1])
    whole = reference_ids(name, tokenizer, messages, None, as_prompt=False)
    assert prompt == reference_ids(name, tokenizer, messages[:1], None, as_prompt=True)
    assert whole[: len(prompt)] != prompt  # the trap
    (datum,) = conversation_to_datums(messages, tokenizer, 4096)
    tokens = all_tokens(datum)
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(whole).startswith(tokenizer.decode(tokens))

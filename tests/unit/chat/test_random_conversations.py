"""Random conversations in every family: what is rendered is parsed back, and the examples keep their invariants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.chat_cases import (
    FEATURES,
    Messages,
    answer,
    holds_closed_thought,
    reference_ids,
    result,
    settings_of,
    system,
    user,
)
from tests.unit.chat.conversations import all_tokens, all_weights, trained_runs
from tests.unit.chat.test_families import PARSES_NO_CALLS, renderer_of
from tests.unit.chat.tiny_tokenizers import ALL_FAMILIES

from mint.chat import conversation_to_datums

SETTINGS = [
    (name, thinking) for name, family in ALL_FAMILIES.items() for thinking in settings_of(family.template or name)
]
every_setting = pytest.mark.parametrize(
    ("name", "thinking"), SETTINGS, ids=[f"{name}{' thinking' if on else ''}" for name, on in SETTINGS]
)
few = settings(deadline=None, max_examples=10, derandomize=True)

# no "<", which could spell a tag of a family's markup; that is test_borders.py's
letters = st.sampled_from("abzAZ019 .,:;!?'\"\\/{}[]()>|#*`~_-+=\n\téß世界🙂")
texts = st.text(letters, min_size=1, max_size=30).map(str.strip).filter(bool)
names = st.text("abcxyz_", min_size=1, max_size=8)
numbers = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: x != 0)
leaves = texts | st.booleans() | st.none() | numbers
nested = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)

# These write an argument's text without quotes, so that text which reads as JSON cannot be told from JSON,
WITHOUT_QUOTES = ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "glm4moe")


def _is_not_json(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    try:
        json.loads(value)
    except ValueError:
        return value not in ("True", "False", "None")
    return False


def arguments_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    values = nested.filter(_is_not_json) if name in WITHOUT_QUOTES else nested
    return st.dictionaries(names, values, max_size=3)


@st.composite
def conversations(draw: st.DrawFn, name: str, thinking: bool) -> Messages:
    """A conversation that the family can express and train: turns of a question, calls and results, and an answer."""
    template = ALL_FAMILIES[name].template or name
    features = FEATURES[template]
    thinks = "reasoning" in features and (thinking or template == "gptoss")
    # gpt-oss takes the thought before a call out when an answer follows
    calls = "calls" in features and "several calls" in features and not (thinks and template == "gptoss")
    every_turn_thinks = template == "nemotron_3_nano"

    def reasoning() -> str | None:
        if not thinks:
            return None
        return draw(texts if every_turn_thinks else st.none() | texts)

    messages = [system(draw(texts))] if "system" in features and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(texts)))
        if calls and draw(st.booleans()):
            count = draw(st.integers(1, 2)) if "parallel calls" in features else 1
            made = [(draw(names), draw(arguments_of(name))) for _ in range(count)]
            beside = draw(texts) if "text beside a call" in features and draw(st.booleans()) else ""
            messages.append(answer(beside, reasoning(), made))
            messages += [result(draw(texts)) for _ in made]
        messages.append(answer(draw(texts), reasoning()))
    return messages


@every_setting
@few
@given(data=st.data())
def test_examples_train_every_answer_once_after_its_prompt_and_parse_gives_it_back(
    name: str, thinking: bool, data: st.DataObject
) -> None:
    messages = data.draw(conversations(name, thinking))
    renderer, template = renderer_of(name, thinking), ALL_FAMILIES[name].template or name
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    runs = []
    for datum in conversation_to_datums(messages, renderer, 100_000):
        inputs, targets = datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()
        assert inputs[1:] == targets[:-1] and len(inputs) == len(datum.loss_fn_inputs["weights"].tolist())
        tokens, weights = all_tokens(datum), all_weights(datum)
        assert weights[-1] == 1.0
        found = trained_runs(tokens, weights)
        assert found
        stop = 0
        for run in found:
            start = next(i for i in range(stop, len(weights)) if weights[i])
            stop = start + len(run)
            runs.append(tokens[:stop])
    assert len(runs) == len(answers)
    for tokens, index in zip(runs, answers, strict=True):
        prompt = renderer.prompt(messages[:index])
        assert tokens[: len(prompt)] == prompt
        wanted = reference_ids(template, renderer.tokenizer, messages[:index], None, as_prompt=True, thinking=thinking)
        if holds_closed_thought(template, thinking, renderer.tokenizer.decode(wanted)):
            assert renderer.tokenizer.decode(prompt) == renderer.tokenizer.decode(wanted)
        else:
            assert prompt == wanted
        assert tokens[-1] in renderer.stop_token_ids
        if name in PARSES_NO_CALLS and messages[index].get("tool_calls"):
            continue
        response = renderer.parse(tokens[len(prompt) :])
        expected = messages[index]
        assert response.content == expected["content"]
        assert response.reasoning == expected.get("reasoning_content")
        assert list(response.tool_calls) == expected.get("tool_calls", [])
        assert response.ended == ("tool_call" if expected.get("tool_calls") else "end_of_turn")

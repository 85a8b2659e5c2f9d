"""Every family on every conversation that its template can express, against the template itself.

Contents here have no whitespace at their borders and no text of control tokens; test_borders.py has those.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tests.support.chat_cases import (
    CASES,
    FEATURES,
    OPENS_THOUGHT,
    TOOLS,
    Case,
    answer,
    can_be_trained,
    cases_of,
    holds_closed_thought,
    reference_ids,
    settings_of,
    user,
)
from tests.unit.chat.conversations import all_tokens, all_weights
from tests.unit.chat.tiny_tokenizers import ALL_FAMILIES, tokenizer_of

import mint.chat
from mint.chat import conversation_to_datums, get_renderer
from mint.errors import DataError, UnsupportedError

MAX = 8192
# What the template writes between the generation prompt and the content, so that the model has to write it too.
OPENING = {"gptoss": "<|channel|>final<|message|>", "glm4moe": "\n"}
NO_CALLS = sorted(name for name, features in FEATURES.items() if "calls" not in features)
NO_REASONING = sorted(name for name, features in FEATURES.items() if "reasoning" not in features)


@cache
def renderer_of(name: str, thinking: bool) -> Any:
    return get_renderer(tokenizer_of(name), thinking=thinking)


@dataclass(frozen=True)
class Setup:
    """One family, one value of the thinking switch, one conversation."""

    name: str
    thinking: bool
    title: str

    @property
    def template(self) -> str:
        return ALL_FAMILIES[self.name].template or self.name

    @property
    def case(self) -> Case:
        return CASES[self.title]

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.name)

    @property
    def renderer(self) -> Any:
        return renderer_of(self.name, self.thinking)

    @property
    def row(self) -> Any:
        return {"messages": self.case.messages, "tools": self.case.tools} if self.case.tools else self.case.messages

    @cache  # noqa: B019, lives as long as the tests do
    def reference(self, count: int, *, as_prompt: bool) -> list[int]:
        """What the template makes of the first `count` messages."""
        messages, tools = self.case.messages[:count], self.case.tools
        return reference_ids(
            self.template, self.tokenizer, messages, tools, as_prompt=as_prompt, thinking=self.thinking
        )

    @cache  # noqa: B019
    def prompt(self, count: int) -> list[int]:
        """What MinT makes of them."""
        return [int(token) for token in self.renderer.prompt(self.case.messages[:count], self.case.tools)]

    @cache  # noqa: B019
    def datums(self, train_on: Any = "all_assistant") -> list[Any]:
        return conversation_to_datums(self.row, self.renderer, MAX, train_on)

    def keeps_sampled_tokens(self, count: int) -> bool:
        """Whether the first `count` messages hold a turn that was sampled in other tokens than its text gives.

        Where the prompt opens the thought, an empty one is sampled as "\\n" after "\\n", which in one text are one token.
        """
        return holds_closed_thought(self.template, self.thinking, self.decode(self.reference(count, as_prompt=True)))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


ALL_SETUPS = [
    Setup(name, thinking, title)
    for name, family in ALL_FAMILIES.items()
    for thinking in settings_of(family.template or name)
    for title, _ in cases_of(family.template or name)
]
TRAINABLE = [one for one in ALL_SETUPS if can_be_trained(one.template, one.thinking, one.case)]


def for_each(setups: list[Setup]) -> Callable[[Callable[[Setup], None]], Any]:
    """Makes a check of one setup a test of every family and setting of the thinking switch, with all its setups."""
    groups: dict[str, list[Setup]] = {}
    for one in setups:
        groups.setdefault(f"{one.name}{' thinking' if one.thinking else ''}", []).append(one)

    def decorate(check: Callable[[Setup], None]) -> Any:
        def test(group: list[Setup]) -> None:
            for setup in group:
                check(setup)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return pytest.mark.parametrize("group", groups.values(), ids=groups)(test)

    return decorate


@dataclass(frozen=True)
class Trained:
    """An unbroken run of trained tokens: tokens[start:stop] of a datum."""

    tokens: list[int]
    start: int
    stop: int

    @property
    def ids(self) -> list[int]:
        return self.tokens[self.start : self.stop]


def trained(setup: Setup, train_on: Any = "all_assistant") -> list[list[Trained]]:
    """The trained runs of every datum."""
    return [_runs(datum) for datum in setup.datums(train_on)]


def _runs(datum: Any) -> list[Trained]:
    tokens, weights = all_tokens(datum), all_weights(datum)
    assert set(weights) <= {0.0, 1.0}
    starts = [i for i, weight in enumerate(weights) if weight and not weights[i - 1]]
    stops = [i + 1 for i, weight in enumerate(weights) if weight and not [*weights, 0.0][i + 1]]
    return [Trained(tokens, start, stop) for start, stop in zip(starts, stops, strict=True)]


def expected_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message with their arguments as mappings."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "arguments": json.loads(function["arguments"])
                if isinstance(function["arguments"], str)
                else function["arguments"],
            },
        }
        for function in functions
    ]


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


@for_each(ALL_SETUPS)
def test_every_prompt_equals_the_template_token_for_token_with_one_bos_at_most(setup: Setup) -> None:
    bos = setup.tokenizer.bos_token_id
    for count in setup.case.prompts:
        prompt = setup.prompt(count)
        reference = setup.reference(count, as_prompt=True)
        if setup.keeps_sampled_tokens(count):
            assert setup.decode(prompt) == setup.decode(reference), f"the first {count} messages"
        else:
            assert prompt == reference, f"the first {count} messages"
        assert setup.name == "smollm2" or bos not in prompt[1:]  # whose BOS is the header of every turn


def test_prompt_of_the_package_is_the_renderers() -> None:
    tokenizer = tokenizer_of("qwen3")
    messages = [user("Weather?")]
    expected = get_renderer(tokenizer).prompt(messages, TOOLS)
    assert mint.chat.prompt(messages, tokenizer, tools=TOOLS) == expected
    thinking = get_renderer(tokenizer, thinking=True)
    assert mint.chat.prompt(messages, thinking, tools=TOOLS) == thinking.prompt(messages, TOOLS) != expected


@for_each(TRAINABLE)
def test_concatenated_examples_train_every_answer_once_after_the_samplers_prompt(setup: Setup) -> None:
    runs = [run for datum in trained(setup) for run in datum]
    assert len(runs) == len(setup.case.answers)
    for run, index in zip(runs, setup.case.answers, strict=True):
        prompt = setup.prompt(index)
        assert run.tokens[: len(prompt)] == prompt, f"message {index}"
        assert len(prompt) <= run.start < run.stop


@for_each(TRAINABLE)
def test_an_answer_is_what_the_template_writes_after_the_prompt(setup: Setup) -> None:
    """Also where the sampler's tokens differ from those of the template in one piece, the text is the same."""
    end = ALL_FAMILIES[setup.name].closing + ALL_FAMILIES[setup.name].end_of_turn
    runs = [run for datum in trained(setup) for run in datum]
    compared = 0
    for run, index in zip(runs, setup.case.answers, strict=True):
        prompt = setup.reference(index, as_prompt=True)
        finished = setup.reference(index + 1, as_prompt=False)
        if setup.template == "glm4moe":  # writes no end: the next turn's header ends a turn
            finished = [*finished, *run.ids[-1:]]
        if finished[: len(prompt)] == prompt:
            assert run.tokens[: run.stop] == finished[: run.stop], f"message {index}"
            rest = setup.decode(finished[run.stop :])
            compared += 1
        elif setup.decode(finished).startswith(setup.decode(prompt)):
            text = setup.decode(run.tokens[: run.stop])
            assert setup.decode(finished).startswith(text), f"message {index}"
            rest = setup.decode(finished).removeprefix(text)
            compared += 1
        else:  # the template writes earlier messages otherwise
            continue
        assert rest in ("", "\n", "\n<|endoftext|>", "<|endoftext|>")
    assert compared or setup.case.has_reasoning or setup.template in OPENS_THOUGHT
    if not any(setup.case.messages[index].get("tool_calls") for index in setup.case.answers):
        for run, index in zip(runs, setup.case.answers, strict=True):
            assert setup.decode(run.ids).endswith(text_of(setup.case.messages[index]) + end)


CONTENT_ALONE = [one for one in TRAINABLE if not (one.case.has_reasoning or "calls" in one.case.needs)]


@for_each(CONTENT_ALONE)
def test_trained_text_is_the_answers_and_their_end_tokens(setup: Setup) -> None:
    """Also where the template puts an empty thought before an answer that has none: a model is not taught to skip it."""
    end = ALL_FAMILIES[setup.name].closing + ALL_FAMILIES[setup.name].end_of_turn
    opening = "" if setup.thinking else OPENING.get(setup.name, "")
    texts = [setup.decode(run.ids) for datum in trained(setup) for run in datum]
    assert texts == [opening + text_of(setup.case.messages[index]) + end for index in setup.case.answers]


@for_each(TRAINABLE)
def test_the_last_trained_token_of_an_answer_is_the_only_stop_token_in_it(setup: Setup) -> None:
    stops = set(setup.renderer.stop_token_ids)
    for datum in trained(setup):
        for run in datum:
            assert [token in stops for token in run.ids] == [False] * (len(run.ids) - 1) + [True]


@for_each([one for one in ALL_SETUPS if one not in TRAINABLE])
def test_what_cannot_follow_its_prompt_is_refused_naming_the_message(setup: Setup) -> None:
    with pytest.raises(DataError, match=r"^\[(thinking_mismatch|no_continuation|not_shown)\] message \d"):
        setup.datums()


@for_each(TRAINABLE)
def test_there_is_a_new_datum_exactly_where_the_template_rewrites_the_history(setup: Setup) -> None:
    answers = setup.case.answers
    runs = [run for datum in trained(setup) for run in datum]
    breaks = 0
    for run, following in zip(runs, answers[1:], strict=False):
        breaks += setup.prompt(following)[: run.stop] != run.tokens[: run.stop]
    datums = trained(setup)
    assert len(datums) == 1 + breaks and all(datums)


@for_each(TRAINABLE)
def test_a_datum_ends_with_its_last_trained_token_and_weights_stand_over_their_targets(setup: Setup) -> None:
    for datum in setup.datums():
        inputs = datum.model_input.to_ints()
        targets = datum.loss_fn_inputs["target_tokens"].tolist()
        weights = datum.loss_fn_inputs["weights"].tolist()
        assert len(inputs) == len(targets) == len(weights)
        assert inputs[1:] == targets[:-1]
        assert weights[-1] == 1.0


@for_each(TRAINABLE)
def test_last_assistant_trains_the_last_answer_only(setup: Setup) -> None:
    last = setup.case.answers[-1]
    ((run,),) = trained(setup, "last_assistant")
    prompt = setup.prompt(last)
    assert run.tokens[: len(prompt)] == prompt and run.start >= len(prompt)
    assert run.tokens == trained(setup)[-1][-1].tokens


PARSES_NO_CALLS = ("lfm2_v2",)  # rendered by its template, with no parser for its way of calling
PARSED = [one for one in TRAINABLE if not (one.name in PARSES_NO_CALLS and "calls" in one.case.needs)]


@for_each(PARSED)
def test_the_parsed_answer_is_the_message_and_gives_the_same_prompt_when_it_is_put_back(setup: Setup) -> None:
    runs = [run for datum in trained(setup) for run in datum]
    messages = list(setup.case.messages)
    for run, index in zip(runs, setup.case.answers, strict=True):
        message = setup.case.messages[index]
        sampled = run.tokens[len(setup.prompt(index)) : run.stop]
        response = setup.renderer.parse(sampled, setup.case.tools)
        assert (response.content, response.reasoning) == (text_of(message), message.get("reasoning_content"))
        assert list(response.tool_calls) == expected_calls(message)
        assert response.finished and response.ended == ("tool_call" if message.get("tool_calls") else "end_of_turn")
        cut = setup.renderer.parse(sampled[:-1], setup.case.tools)
        assert (cut.ended, cut.finished) == ("cut_off", False)
        assert response.message["role"] == "assistant"
        messages[index] = response.message
    for count in setup.case.prompts:
        assert setup.renderer.prompt(messages[:count], setup.case.tools) == setup.prompt(count)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "gptoss", "phi3"])
def test_an_answer_ended_by_the_end_of_text_is_told_apart(name: str) -> None:
    ends = {"llama3_1": "<|end_of_text|>"}
    tokenizer = tokenizer_of(name)
    renderer = get_renderer(tokenizer)
    end = tokenizer.convert_tokens_to_ids(ends.get(name, "<|endoftext|>"))
    assert end in renderer.stop_token_ids
    text = tokenizer.encode(OPENING.get(name, "") + "Hello.", add_special_tokens=False)
    response = renderer.parse([*text, end, *text])
    assert (response.content, response.ended, response.finished) == ("Hello.", "end_of_text", True)


@pytest.mark.parametrize("name", NO_CALLS)
def test_a_template_that_drops_tool_calls_is_refused_for_them_naming_the_message(name: str) -> None:
    row = CASES["call without a list of tools"]
    with pytest.raises((DataError, UnsupportedError), match="message 1"):
        conversation_to_datums(row.messages, tokenizer_of(name), MAX)


@pytest.mark.parametrize("name", [name for name, features in FEATURES.items() if "tools" not in features])
def test_a_template_that_drops_the_list_of_tools_is_refused_for_it(name: str) -> None:
    with pytest.raises((DataError, UnsupportedError), match="tools"):
        get_renderer(tokenizer_of(name)).prompt([user("Hello")], TOOLS)


@pytest.mark.parametrize("name", NO_REASONING)
def test_a_template_that_drops_reasoning_is_refused_for_it_naming_the_message(name: str) -> None:
    messages = [user("2 + 2?"), answer("4.", "Two and two.")]
    with pytest.raises((DataError, UnsupportedError), match="message 1"):
        conversation_to_datums(messages, tokenizer_of(name), MAX)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "gptoss"])
def test_a_template_that_knows_one_call_at_a_time_is_refused_for_two(name: str) -> None:
    row = CASES["two calls at once"]
    with pytest.raises((DataError, UnsupportedError), match="message 1"):
        conversation_to_datums({"messages": row.messages, "tools": row.tools}, tokenizer_of(name), MAX)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_a_template_that_drops_text_beside_a_call_is_refused_for_it(name: str) -> None:
    row = CASES["text beside a call"]
    with pytest.raises((DataError, UnsupportedError), match="message 1"):
        conversation_to_datums({"messages": row.messages, "tools": row.tools}, tokenizer_of(name), MAX)


def test_every_feature_is_exercised_by_some_case_of_every_family_that_has_it() -> None:
    for template, features in FEATURES.items():
        used = {need for _, case in cases_of(template) for need in case.needs}
        assert used == features, template

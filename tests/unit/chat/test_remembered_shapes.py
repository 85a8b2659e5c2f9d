"""What is filled in from memory equals what the template writes anew; rows encoded together equal rows one by one."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.chat_cases import TOOLS, Messages
from tests.unit.chat.test_families import renderer_of
from tests.unit.chat.test_random_conversations import every_setting

from mint.chat import Converter, show_row
from mint.chat.renderer import Renderer
from mint.chat.scribe import Scribe
from mint.errors import DataError

few = settings(deadline=None, max_examples=6, derandomize=True)

words = st.sampled_from(
    ["", "a", "Hello there", "1. one\n2. two", "e\u0301 世界 🙂", "Say <b>", "<think>", "a</think>b"]
)
blanks = st.sampled_from(["", "", "", " ", "\n", "\n\n ", "\t"])
contents = st.tuples(blanks, words, blanks).map("".join)


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """Conversations of all kinds, also such as no template can write."""
    messages: Messages = []
    for role in draw(
        st.lists(st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"]), max_size=6)
    ):
        message: dict[str, Any] = {"role": role, "content": draw(contents)}
        if role == "assistant" and draw(st.integers(0, 3)) == 0:
            message["reasoning_content"] = draw(contents)
        messages.append(message)
    messages += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    return {"messages": messages, "tools": TOOLS} if draw(st.integers(0, 5)) == 0 else messages


@cache
def forgetful(name: str, thinking: bool) -> Any:
    """The same renderer, which has the template write everything anew."""
    remembering = renderer_of(name, thinking)
    scribe = Scribe(remembering.style)
    scribe._remembers = False
    return Renderer(scribe, remembering.date)


def prompt_or_error(renderer: Any, row: Any) -> Any:
    messages, tools = (row["messages"], row["tools"]) if isinstance(row, dict) else (row, None)
    try:
        return renderer.prompt(messages, tools)
    except DataError as error:
        return str(error)


def in_full(outcome: Any) -> Any:
    """All of an outcome in values that can be compared."""
    conversion = outcome.conversion
    examples = [(e.tokens, e.weights.tolist(), e.answers) for e in conversion.examples] if conversion else None
    rest = (
        [getattr(conversion, name) for name in type(conversion).__slots__ if name != "examples"] if conversion else None
    )
    return outcome.number, outcome.digest, str(outcome.error), examples, rest


@every_setting
@few
@given(batch=st.lists(rows(), min_size=1, max_size=3), longest=st.sampled_from([20, 60, 4096]))
def test_memory_and_batches_change_nothing(name: str, thinking: bool, batch: list[Any], longest: int) -> None:
    renderer, anew = renderer_of(name, thinking), forgetful(name, thinking)
    one_by_one = [Converter(anew, longest, on_overlong="truncate_left_turns").outcome(*row) for row in enumerate(batch)]
    converter = Converter(renderer, longest, on_overlong="truncate_left_turns")
    assert [in_full(o) for o in converter.outcomes(enumerate(batch))] == [in_full(o) for o in one_by_one]
    assert [in_full(converter.outcome(*row)) for row in enumerate(batch)] == [in_full(o) for o in one_by_one]
    for row in batch:
        assert prompt_or_error(renderer, row) == prompt_or_error(anew, row)


@every_setting
@few
@given(row=rows(), longest=st.sampled_from([20, 60, 4096]))
def test_the_tokens_shown_are_those_trained(name: str, thinking: bool, row: Any, longest: int) -> None:
    converter = Converter(renderer_of(name, thinking), longest, on_overlong="truncate_left_turns")
    outcome, shown = converter.outcome(0, row), show_row(0, row, converter)
    assert (shown.error is None) == (outcome.error is None)
    if outcome.error is None:
        seen = [
            ([t.id for t in kept], [t.weight for t in kept])
            for example in shown.examples
            if (kept := [token for token in example if token.kind != "truncated"])
        ]
        made = [(e.tokens, e.weights.tolist()) for e in outcome.conversion.examples]
        assert seen == made

"""That a transcript says what the messages say: nothing left out, nothing changed, nothing twice or out of its turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mint.chat.marks import content_number, marked_parts, numbers_in, unmarked
from mint.chat.messages import Message, data_error
from mint.errors import DataError


def thinking_mismatch(index: int) -> DataError:
    return data_error(
        "thinking_mismatch",
        f"message {index} has a thought, but the prompt says that there is none (thinking=False); "
        "use get_renderer(tokenizer, thinking=True) or remove the thoughts",
    )


def no_continuation(prompt: str, full: str, index: int) -> DataError:
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full))
    )
    return data_error(
        "no_continuation",
        f"message {index} does not continue its prompt: the template's prompt goes on with "
        f"{unmarked(prompt[shared : shared + 40])!r} where the finished conversation has "
        f"{unmarked(full[shared : shared + 40])!r}; the model would be trained on what it is never given",
    )


def require_answer(message: Message, index: int, answer: str, *, thoughts_are_off: bool) -> None:
    """That the answer says all that the message does. thoughts_are_off: by choice, so that a thought in it is a mismatch."""
    wanted = [("content", message.content), ("reasoning", message.reasoning or "")]
    wanted += [("tool call", call.name) for call in message.tool_calls]
    for what, said in wanted:
        if _is_said(said, answer):
            continue
        if what == "reasoning" and thoughts_are_off:
            raise thinking_mismatch(index)
        raise data_error(
            "not_shown",
            f"message {index}: the chat template leaves out or changes its {what}; remove it, or use a tokenizer whose "
            "template shows it",
        )


def require_shown(messages: Sequence[Message], text: str) -> None:
    """That the text has what every message says. Thoughts may go, and what an assistant says beside a thought or a call."""
    for index, message in enumerate(messages):
        may_go = message.role == "assistant" and (message.tool_calls or message.reasoning)
        is_said = _is_mentioned if message.role == "tool" else _is_said
        if not may_go and not is_said(message.content, text):
            raise data_error(
                "not_shown", f"message {index} ({message.role}): the chat template leaves it out or changes its text"
            )
    # system texts may be gathered in front; all else comes once, in its turn
    order = [number // 2 for number in numbers_in(text) if number == content_number(number // 2)]
    turns = [index for index in order if messages[index].role not in ("system", "developer")]
    wrong = next((index for before, index in pairwise(turns) if index <= before), None)
    if wrong is not None:
        raise data_error(
            "not_shown",
            f"message {wrong} ({messages[wrong].role}): the chat template writes it twice or out of its turn",
        )


def require_tools(tools: Sequence[Any], text: str) -> None:
    names = [str(tool.get("function", tool).get("name")) for tool in tools]
    missing = [name for name in names if name not in text]
    if missing:
        raise data_error(
            "not_shown",
            f"the chat template leaves out the tools {', '.join(missing)}; remove 'tools', or use a tokenizer whose template "
            "shows them",
        )


def _is_said(part: str, text: str) -> bool:
    """Whether what is marked in `part` is in `text` as it is; where marks could not be used, its text."""
    said = {(inside, number) for inside, number in marked_parts(part) if number is not None}
    return said <= set(marked_parts(text)) if said else part.strip() in text


def _is_mentioned(part: str, text: str) -> bool:
    """The same of a tool's result, which templates may write in another way, as JSON for instance."""
    numbers = numbers_in(part)
    return set(numbers) <= set(numbers_in(text)) if numbers else part.strip() in text

"""What ends a sequence besides its tokens.

Stop strings: text is recognised in what the tokens decode to, so that it may begin and end inside tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mint.engine.backend import StopCheck

Decode = Callable[[list[int]], str]


def new_stop_check(stop_strings: tuple[str, ...], decode: Decode) -> StopCheck:
    """A check for one sequence. Only the tail that may hold a new occurrence is decoded again."""
    # a token ends at least one byte; a few more tokens let a character's bytes come together
    window = max(len(s.encode()) for s in stop_strings) + 8
    tail: list[int] = []

    def check(token: int) -> bool:
        tail.append(token)
        del tail[:-window]
        text = decode(tail)
        return any(stop in text for stop in stop_strings)

    return check


def any_of(makers: Sequence[Callable[[], StopCheck]]) -> StopCheck:
    """One check for one sequence; every part is fed every token."""
    checks = [make() for make in makers]
    return lambda token: sum(check(token) for check in checks) > 0

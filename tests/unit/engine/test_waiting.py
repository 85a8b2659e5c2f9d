"""Tenants take turns; of a tenant first come, first served."""

from __future__ import annotations

from mint.engine.sampling.waiting import WaitingRequests


def test_tenants_take_turns_and_nobody_overtakes_within_a_tenant() -> None:
    waiting = filled("a1 a2 a3 b4 b5 c6")
    assert len(waiting) == 6
    assert taken(waiting, 2) == ["a1", "b4"]
    waiting.add("d", 7, "d7")  # a newcomer is behind those who were there
    waiting.add("b", 8, "b8")
    assert taken(waiting, 6) == ["c6", "a2", "b5", "d7", "a3", "b8"]
    assert not waiting


def test_who_comes_back_is_behind_the_others() -> None:
    waiting = filled("a1 b2 b3 b4")
    assert taken(waiting, 2) == ["a1", "b2"]
    waiting.add("a", 5, "a5")
    assert taken(waiting, 3) == ["b3", "a5", "b4"]


def test_removing_a_request_leaves_the_others_in_order() -> None:
    waiting = filled("a1 a2 b3 b4 c5")
    for number in (1, 3, 99, 1):
        waiting.remove(number)
    assert len(waiting) == 3
    waiting.remove(5)
    assert taken(waiting, 2) == ["a2", "b4"]
    assert not waiting


def filled(requests: str) -> WaitingRequests[str]:
    """Each request is its tenant and its number."""
    waiting: WaitingRequests[str] = WaitingRequests()
    for request in requests.split():
        waiting.add(request[0], int(request[1:]), request)
    return waiting


def taken(waiting: WaitingRequests[str], count: int) -> list[str]:
    found = []
    for _ in range(count):
        found.append(waiting.first())
        waiting.take_first()
    return found

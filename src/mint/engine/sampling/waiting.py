"""Who waits to begin, and in which order: tenants take turns, so that of a burst one request stands before another's first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Request = TypeVar("Request")


class WaitingRequests(Generic[Request]):
    """By tenant, whose next turn comes first; of a tenant first come, first served."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, OrderedDict[int, Request]] = OrderedDict()
        self._tenants: dict[int, str] = {}  # of every request's number

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, tenant: str, number: int, request: Request) -> None:
        self._tenants[number] = tenant
        self._queues.setdefault(tenant, OrderedDict())[number] = request

    def first(self) -> Request:
        """The next one; there must be one."""
        queue = next(iter(self._queues.values()))
        return next(iter(queue.values()))

    def take_first(self) -> None:
        """It begins; its tenant goes behind the others."""
        tenant, queue = next(iter(self._queues.items()))
        self._queues.move_to_end(tenant)
        self.remove(next(iter(queue)))

    def remove(self, number: int) -> None:
        """Does nothing where it does not wait."""
        tenant = self._tenants.pop(number, None)
        if tenant is not None:
            del self._queues[tenant][number]
            if not self._queues[tenant]:
                del self._queues[tenant]

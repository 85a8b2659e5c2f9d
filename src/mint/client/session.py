"""`OpenSession`: a session of the service, open as long as anybody holds a client that belongs to it."""

from __future__ import annotations

import contextlib
import weakref

from mint.errors import ClosedError
from mint.service import Service


class OpenSession:
    """Held by the ServiceClient that opened it and by the clients made there: closed at the latest with the last one."""

    def __init__(self, service: Service, session_id: str) -> None:
        self.service, self.id = service, session_id
        weakref.finalize(self, _close, service, session_id).atexit = False

    def close(self) -> None:
        """Free what was made in the session. Closing twice is closing once."""
        self.service.close_session(self.id).result()


def _close(service: Service, session_id: str) -> None:
    with contextlib.suppress(ClosedError):  # the service itself is gone
        service.close_session(session_id)

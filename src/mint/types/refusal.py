"""What a pydantic type refuses, raised as MinT's own error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mint.errors import InputError, MintError

T = TypeVar("T", bound=type[BaseModel])


def refuses_with_input_error(cls: T) -> T:
    """Class decorator: a constructor call raises InputError (or what a validator of ours raised), never pydantic's."""
    plain: Callable[..., None] = cls.__init__

    @functools.wraps(plain)
    def init(self: BaseModel, **fields: Any) -> None:
        try:
            plain(self, **fields)
        except ValidationError as error:
            raise _as_own_error(cls.__name__, error) from None

    setattr(cls, "__init__", init)  # noqa: B010  # a class's own method may be replaced, an instance's not
    return cls


def _as_own_error(name: str, error: ValidationError) -> MintError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MintError):
        return cause
    field = ".".join(str(part) for part in first["loc"])
    return InputError(f"{name}: {field}: {first['msg']}")

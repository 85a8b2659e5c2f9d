"""What a pydantic type refuses, raised as MinT's own error."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo

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


def whole_number(value: object, name: str = "") -> int:
    """A Python, numpy or torch integer as int; InputError on anything else, booleans and numbers in quotes included."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]  # whatever has no __index__ is refused below
    except TypeError:
        pass
    raise InputError(f"{name}={value!r}: expected a whole number")


def _whole_number_field(value: object, info: ValidationInfo) -> int | None:
    return None if value is None else whole_number(value, info.field_name or "")


WholeNumber = Annotated[int, BeforeValidator(_whole_number_field)]


def _as_own_error(name: str, error: ValidationError) -> MintError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MintError):
        return cause
    field = ".".join(str(part) for part in first["loc"])
    return InputError(f"{name}: {field}: {first['msg']}")

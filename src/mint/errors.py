"""Every exception MinT raises on purpose. Imports nothing of MinT.

    MintError
    |-- InputError (ValueError)             what was given cannot be used; nothing was changed
    |   |-- UnsupportedError                a known thing that this build or door cannot do
    |   |-- ModelNotFoundError              no such base model, folder or package
    |   |-- ModelAccessError                the hub knows the model and refuses it (gated, private)
    |   |-- CheckpointNotFoundError         no such run or checkpoint
    |   |-- CheckpointError                 a checkpoint that is damaged, foreign or in the way
    |   `-- DataError                       a conversation or data set row that cannot be used
    |-- HubUnreachableError (ConnectionError)   a download is needed and the hub does not answer
    |-- StorageError (OSError)              MINT_HOME cannot be written: disk full, read-only
    |-- MissingExtraError (ImportError)     an optional dependency is not installed
    |-- NumericsError (ArithmeticError)     a loss or gradient that is not finite
    |-- OperationError (RuntimeError)       an operation cannot run in the present state
    |   `-- ClosedError                     the client, run or session was closed, or the process forked
    `-- ResultTimeoutError (TimeoutError)   the result is not there yet; the work goes on

Every one is built from its message alone, so that it survives pickling and crosses process borders.
A message says what was given, what is allowed and what to do next.
"""

from __future__ import annotations


class MintError(Exception):
    """Root of the tree above."""


class InputError(MintError, ValueError):
    """What was given cannot be used. The object it was given to is unchanged and usable."""


class UnsupportedError(InputError):
    """A known thing that this build of MinT, or this door to it, cannot do."""


class ModelNotFoundError(InputError):
    """No base model of that name on the hub, in the cache, on disk or among the packaged ones."""


class ModelAccessError(InputError):
    """The hub has the model but will not hand it over: gated or private."""


class CheckpointNotFoundError(InputError):
    """No run or checkpoint of that name."""


class CheckpointError(InputError):
    """A checkpoint that is damaged, belongs to another model, or already exists."""


class DataError(InputError):
    """A conversation or a row of a data set that cannot be used."""


class HubUnreachableError(MintError, ConnectionError):
    """A download is needed and the hub does not answer."""


class StorageError(MintError, OSError):
    """MINT_HOME cannot be written: the disk is full, read-only or not there. What was saved before is kept."""


class MissingExtraError(MintError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""


class NumericsError(MintError, ArithmeticError):
    """A loss, logprob or gradient that is not finite."""


class OperationError(MintError, RuntimeError):
    """The operation is valid but cannot run in the present state of its run."""


class ClosedError(OperationError):
    """The service, run or session was closed, or this process is a fork of the one that opened it."""


class ResultTimeoutError(MintError, TimeoutError):
    """`result(timeout)` gave up waiting. The work itself was not cancelled."""

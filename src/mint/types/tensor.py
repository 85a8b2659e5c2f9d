"""`TensorData`: the one numeric payload of the SDK, the wire and the engine. Knows numpy; torch only inside `to_torch`.

Source: Tinker protocol, TensorData (dtype int64 or float32, row-major data, optional shape, optional CSR).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mint.errors import InputError

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"int64": np.dtype(np.int64), "float32": np.dtype(np.float32)}


def as_numpy(values: object, name: str = "value") -> npt.NDArray[Any]:
    """A fresh array of a list, tuple, numpy array, torch tensor or TensorData. Raises InputError on anything else."""
    if isinstance(values, TensorData):
        return values.to_numpy().copy()
    detach = getattr(values, "detach", None)
    if detach is not None:  # a torch tensor, recognised without importing torch
        tensor = detach().cpu()
        if str(tensor.layout) != "torch.strided":
            tensor = tensor.to_dense()
        values = tensor.float().numpy() if tensor.dtype.is_floating_point else tensor.numpy()
    if isinstance(values, (str, bytes, dict, set)) or not isinstance(values, (np.ndarray, np.generic, Sequence)):
        raise InputError(
            f"{name}: expected a list, numpy array or torch tensor of numbers, got {type(values).__name__}"
        )
    try:
        array = np.array(values)
    except ValueError as error:
        raise InputError(f"{name}: rows of different lengths cannot form a tensor ({error})") from None
    real = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    if array.size and not real:
        raise InputError(f"{name}: expected numbers, got elements of type {array.dtype}")
    return array


def _cast(array: npt.NDArray[Any], dtype: str, name: str) -> npt.NDArray[Any]:
    """`array` as int64 or float32. A float is accepted as int64 only where it is whole, so nothing is rounded away."""
    if dtype not in _NUMPY_DTYPES:
        raise InputError(f"{name}: dtype {dtype!r} is not supported; allowed: int64, float32")
    if dtype == "int64" and array.size and not np.issubdtype(array.dtype, np.integer):
        whole = np.isfinite(array).all() and (array == np.floor(array)).all()
        if not whole:
            raise InputError(f"{name}: expected whole numbers (int64), got fractions or non-finite values")
    if dtype == "int64" and array.size and not -(2**63) <= int(array.min()) <= int(array.max()) < 2**63:
        raise InputError(f"{name}: whole numbers must fit int64, got {array.min()}..{array.max()}")
    return array.astype(_NUMPY_DTYPES[dtype])


class TensorData:
    """A dense int64 or float32 tensor of any shape; behaves as a sequence along its first axis.

    `data` may be flat with `shape` given (the protocol's form), or nested / numpy / torch with its own shape. With
    `sparse_crow_indices` and `sparse_col_indices` it is read as CSR of a 2-D `shape` and stored dense.
    Raises InputError on what is not a tensor of numbers or does not fit `shape`.
    """

    __slots__ = ("_array",)

    def __init__(
        self,
        data: object,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        array = as_numpy(data, "TensorData")
        if dtype is None and isinstance(data, TensorData):
            dtype = data.dtype
        if dtype is None:
            dtype = "int64" if array.size and np.issubdtype(array.dtype, np.integer) else "float32"
        array = _cast(array, dtype, "TensorData")
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            array = _dense_from_csr(array.ravel(), shape, sparse_crow_indices, sparse_col_indices)
        elif shape is not None:
            shape = _int_list(shape, "shape")
            if int(np.prod(list(shape), dtype=np.int64)) != array.size or any(n < 0 for n in shape):
                raise InputError(f"TensorData: {array.size} values do not fill shape {list(shape)}")
            array = array.reshape(tuple(shape))
        self._array = np.array(array, order="C")
        self._array.flags.writeable = False

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        return cls(tensor)

    @property
    def data(self) -> list[Any]:
        """The values, flattened row-major."""
        return self._array.ravel().tolist()

    @property
    def dtype(self) -> TensorDtype:
        return "int64" if self._array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        return list(self._array.shape)

    def to_numpy(self) -> npt.NDArray[Any]:
        """The values as a read-only array (no copy)."""
        return self._array

    def to_torch(self) -> torch.Tensor:
        """A torch copy of the values."""
        import torch

        return torch.from_numpy(self._array.copy())

    def tolist(self) -> list[Any]:
        nested: list[Any] = self._array.tolist()
        return nested

    def __len__(self) -> int:
        if self._array.ndim == 0:
            raise TypeError("a TensorData of shape [] has no length")
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __getitem__(self, index: Any) -> Any:
        item = self._array[index]
        return item.tolist() if isinstance(item, (np.ndarray, np.generic)) else item

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self._array, dtype=dtype, copy=True if copy is None else copy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self._array, other._array)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return (TensorData, (self._array, self.dtype))

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype}, shape={self.shape})"


def _int_list(values: object, name: str) -> list[int]:
    array = as_numpy(values, f"TensorData: {name}")
    if array.ndim != 1:
        raise InputError(f"TensorData: {name} is a flat list of whole numbers, got shape {list(array.shape)}")
    return [int(value) for value in _cast(array, "int64", f"TensorData: {name}")]


def _dense_from_csr(
    values: npt.NDArray[Any],
    shape: Sequence[int] | None,
    crow_indices: Sequence[int] | None,
    col_indices: Sequence[int] | None,
) -> npt.NDArray[Any]:
    """CSR to dense; entries that are not listed are 0."""
    if shape is None or len(_int_list(shape, "shape")) != 2 or crow_indices is None or col_indices is None:
        raise InputError("TensorData: CSR needs a 2-D shape, sparse_crow_indices and sparse_col_indices together")
    rows, cols = _int_list(shape, "shape")
    crow = np.array(_int_list(crow_indices, "sparse_crow_indices"), np.int64)
    col = np.array(_int_list(col_indices, "sparse_col_indices"), np.int64)
    if (
        rows < 0
        or cols < 0
        or crow.shape != (rows + 1,)
        or col.shape != values.shape
        or crow[0] != 0
        or crow[-1] != len(values)
        or (np.diff(crow) < 0).any()
        or (len(col) and (col.min() < 0 or col.max() >= cols))
    ):
        raise InputError(
            f"TensorData: the CSR indices do not describe a {rows} x {cols} matrix of {len(values)} values"
        )
    dense = np.zeros((rows, cols), values.dtype)
    row = np.repeat(np.arange(rows), np.diff(crow))
    if len(np.unique(row * cols + col)) != len(col):
        raise InputError("TensorData: the CSR indices name a place of the matrix twice")
    dense[row, col] = values
    return dense

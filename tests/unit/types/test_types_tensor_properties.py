"""TensorData for any numbers: what goes in comes out, and compressed rows mean the same as dense ones."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mint.types import TensorData

INTEGERS = hnp.arrays(np.int64, hnp.array_shapes(max_dims=3, max_side=5))
FLOATS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32))
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(st.one_of(INTEGERS, FLOATS))
def test_values_come_back_unchanged(values: np.ndarray) -> None:
    tensor = TensorData(values)
    np.testing.assert_array_equal(tensor.to_numpy(), values)
    np.testing.assert_array_equal(tensor.to_torch().numpy(), values)
    np.testing.assert_array_equal(np.array(tensor.tolist(), values.dtype), values)
    assert tensor.shape == list(values.shape)
    assert tensor.dtype == values.dtype.name


@QUICK
@given(st.one_of(INTEGERS, FLOATS))
def test_flat_data_with_its_shape_is_the_same_tensor(values: np.ndarray) -> None:
    assume(not np.isnan(values).any())
    tensor = TensorData(values)
    assert TensorData(tensor.data, tensor.dtype, tensor.shape) == tensor
    assert pickle.loads(pickle.dumps(tensor)) == tensor
    assert TensorData(torch.from_numpy(values.copy())) == tensor


@QUICK
@given(
    hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 3)),
    st.booleans(),
)
def test_compressed_rows_equal_the_dense_matrix(dense: np.ndarray, as_float: bool) -> None:
    values = dense.astype(np.float32 if as_float else np.int64)
    rows, cols = np.nonzero(values)
    crow = np.searchsorted(rows, np.arange(len(values) + 1))
    dtype = "float32" if as_float else "int64"
    tensor = TensorData(values[rows, cols].tolist(), dtype, list(values.shape), crow.tolist(), cols.tolist())
    assert tensor == TensorData(values)


@QUICK
@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20))
def test_a_list_behaves_as_the_list(values: list[int]) -> None:
    tensor = TensorData(values)
    assert list(tensor) == values
    assert len(tensor) == len(values)
    assert sum(tensor) == sum(values)
    assert [tensor[i] for i in range(len(values))] == values
    assert tensor[::-1] == values[::-1]

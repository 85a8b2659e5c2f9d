"""TensorData: what it accepts, how it behaves as a sequence, what it refuses and in which words."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from mint import InputError
from mint.types import TensorData


@pytest.mark.parametrize(
    ("given", "dtype", "shape", "nested"),
    [
        ([1, 2, 3], "int64", [3], [1, 2, 3]),
        ((1.5, -2.0), "float32", [2], [1.5, -2.0]),
        ([[1, 2], [3, 4]], "int64", [2, 2], [[1, 2], [3, 4]]),
        ([1, 2.5], "float32", [2], [1.0, 2.5]),
        (range(3), "int64", [3], [0, 1, 2]),
        ([np.int64(4), np.int64(5)], "int64", [2], [4, 5]),
        (np.arange(4, dtype=np.int8), "int64", [4], [0, 1, 2, 3]),
        (np.array([[0.5]], np.float64), "float32", [1, 1], [[0.5]]),
        (torch.tensor([1, 2], dtype=torch.int32), "int64", [2], [1, 2]),
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), "float32", [2], [1.5, 2.0]),
        (torch.tensor([0.25], dtype=torch.float64), "float32", [1], [0.25]),
        (torch.ones(2, requires_grad=True), "float32", [2], [1.0, 1.0]),
        (torch.arange(6).reshape(2, 3).t(), "int64", [3, 2], [[0, 3], [1, 4], [2, 5]]),
        ([torch.tensor(1), torch.tensor(2)], "int64", [2], [1, 2]),
        ([], "float32", [0], []),
    ],
)
def test_lists_numpy_and_torch_are_accepted(given: Any, dtype: str, shape: list[int], nested: Any) -> None:
    tensor = TensorData(given)
    assert (tensor.dtype, tensor.shape, tensor.tolist()) == (dtype, shape, nested)


def test_the_dtype_asked_for_wins_and_whole_floats_become_integers() -> None:
    assert TensorData([1, 2], "float32").tolist() == [1.0, 2.0]
    whole = TensorData([1.0, -2.0], "int64")
    assert (whole.dtype, whole.tolist()) == ("int64", [1, -2])
    assert TensorData([], "int64").dtype == "int64"


def test_flat_data_with_a_shape_is_read_row_by_row() -> None:
    tensor = TensorData([1, 2, 3, 4, 5, 6], "int64", [2, 3])
    assert tensor.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tensor.data == [1, 2, 3, 4, 5, 6]


def test_it_is_a_sequence_along_its_first_axis() -> None:
    flat, nested = TensorData([1.0, 0.0, 2.5]), TensorData([[1, 2], [3, 4]])
    assert len(flat) == 3 and len(nested) == 2
    assert list(flat) == [1.0, 0.0, 2.5] and list(nested) == [[1, 2], [3, 4]]
    assert sum(flat) == 3.5 and list(zip(flat, [1, 2, 3], strict=True))[2] == (2.5, 3)
    assert flat[0] == 1.0 and flat[-1] == 2.5 and flat[1:] == [0.0, 2.5]
    assert nested[1] == [3, 4] and nested[1, 0] == 3
    assert type(flat[0]) is float and type(nested[1, 0]) is int
    assert 2.5 in flat and 7.0 not in flat
    with pytest.raises(IndexError):
        flat[3]


SCALARS = (TensorData(np.array(7)), TensorData([7], "int64", []), TensorData(torch.tensor(7)), TensorData(np.int64(7)))


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_scalar_keeps_its_shape(scalar: TensorData) -> None:
    assert (scalar.shape, scalar.tolist()) == ([], 7)
    with pytest.raises(TypeError, match=r"shape \[\] has no length"):
        len(scalar)


def test_numpy_and_torch_get_the_values() -> None:
    tensor = TensorData([[1, 2], [3, 4]])
    np.testing.assert_array_equal(tensor.to_numpy(), [[1, 2], [3, 4]])
    assert tensor.to_numpy().dtype == np.int64
    assert torch.equal(tensor.to_torch(), torch.tensor([[1, 2], [3, 4]]))
    assert TensorData([1.0]).to_torch().dtype == torch.float32
    np.testing.assert_array_equal(np.asarray(tensor, np.float32), [[1, 2], [3, 4]])
    assert TensorData.from_numpy(np.array([1.5])) == TensorData.from_torch(torch.tensor([1.5])) == TensorData([1.5])


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_changing_the_source_later_changes_nothing(make: Any) -> None:
    source = make([1, 2, 3])
    tensor = TensorData(source)
    source[0] = 99
    assert tensor.tolist() == [1, 2, 3]


def test_what_is_handed_out_cannot_change_it() -> None:
    tensor = TensorData([1.0, 2.0])
    tensor.to_torch()[0] = 99
    np.array(tensor)[0] = 99
    tensor.tolist()[0] = 99
    with pytest.raises(ValueError, match="read-only"):
        tensor.to_numpy()[0] = 99
    assert tensor.tolist() == [1.0, 2.0]
    again = TensorData(tensor)
    assert again == tensor and again.to_numpy() is not tensor.to_numpy()


def test_equality_compares_type_shape_and_values() -> None:
    assert TensorData([1, 2]) == TensorData(np.array([1, 2], np.int32))
    assert TensorData([1, 2]) != TensorData([1.0, 2.0])
    assert TensorData([1, 2]) != TensorData([[1, 2]])
    assert TensorData([1, 2]) != TensorData([1, 3])
    assert TensorData([1, 2]) != [1, 2]
    with pytest.raises(TypeError, match="unhashable"):
        hash(TensorData([1]))


def test_nan_is_carried_and_equals_nothing() -> None:
    tensor = TensorData([float("nan"), 1.0])
    assert np.isnan(tensor[0]) and tensor[1] == 1.0
    assert tensor != TensorData([float("nan"), 1.0])


@pytest.mark.parametrize("tensor", [TensorData([[1, 2]]), TensorData([0.1, 2.0])])
def test_it_survives_pickling_and_copying(tensor: TensorData) -> None:
    assert pickle.loads(pickle.dumps(tensor)) == tensor
    assert copy.deepcopy(tensor) == tensor
    with pytest.raises(ValueError, match="read-only"):
        pickle.loads(pickle.dumps(tensor)).to_numpy()[...] = 0


def test_repr_tells_type_and_shape_and_no_values() -> None:
    assert repr(TensorData([[123456]])) == "TensorData(dtype=int64, shape=[1, 1])"


def test_compressed_rows_are_stored_dense() -> None:
    tensor = TensorData([5, 6, 7], "int64", [3, 4], sparse_crow_indices=[0, 2, 2, 3], sparse_col_indices=[0, 3, 1])
    assert tensor.tolist() == [[5, 0, 0, 6], [0, 0, 0, 0], [0, 7, 0, 0]]
    assert TensorData([], "float32", [2, 2], [0, 0, 0], []).tolist() == [[0.0, 0.0], [0.0, 0.0]]


NOT_NUMBERS = "expected a list, numpy array or torch tensor of numbers, got"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("12",), f"TensorData: {NOT_NUMBERS} str"),
        ((b"12",), f"TensorData: {NOT_NUMBERS} bytes"),
        (({"a": 1},), f"TensorData: {NOT_NUMBERS} dict"),
        (({1, 2},), f"TensorData: {NOT_NUMBERS} set"),
        ((5,), f"TensorData: {NOT_NUMBERS} int"),
        ((None,), f"TensorData: {NOT_NUMBERS} NoneType"),
        ((iter([1]),), f"TensorData: {NOT_NUMBERS} list_iterator"),
        (([True, False],), "TensorData: expected numbers, got elements of type bool"),
        ((torch.tensor([True]),), "TensorData: expected numbers, got elements of type bool"),
        (([None],), "TensorData: expected numbers, got elements of type object"),
        ((["1"],), "TensorData: expected numbers, got elements of type <U1"),
        (([[1, 2], [3]],), "TensorData: rows of different lengths cannot form a tensor"),
        (([1, [2]],), "TensorData: rows of different lengths cannot form a tensor"),
        (([1], "int32"), "TensorData: dtype 'int32' is not supported; allowed: int64, float32"),
        (([1.5], "int64"), r"expected whole numbers \(int64\), got fractions or non-finite values"),
        (([float("nan")], "int64"), r"expected whole numbers \(int64\), got fractions or non-finite values"),
        (([float("inf")], "int64"), r"expected whole numbers \(int64\), got fractions or non-finite values"),
        (([1, 2, 3], "int64", [2, 2]), r"TensorData: 3 values do not fill shape \[2, 2\]"),
        (([1], "int64", [-1]), r"TensorData: 1 values do not fill shape \[-1\]"),
        (([1], "int64", [-1, -1]), r"TensorData: 1 values do not fill shape \[-1, -1\]"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        TensorData(*arguments)


WRONG_CSR = "the CSR indices do not describe a 2 x 3 matrix of 2 values"


@pytest.mark.parametrize(
    ("shape", "crow", "col", "text"),
    [
        (None, [0, 1, 2], [0, 1], "CSR needs a 2-D shape, sparse_crow_indices and sparse_col_indices together"),
        ([6], [0, 1, 2], [0, 1], "CSR needs a 2-D shape"),
        ([2, 3], [0, 1, 2], None, "CSR needs a 2-D shape"),
        ([2, 3], None, [0, 1], "CSR needs a 2-D shape"),
        ([2, 3], [0, 2], [0, 1], WRONG_CSR),
        ([2, 3], [1, 1, 2], [0, 1], WRONG_CSR),
        ([2, 3], [0, 1, 3], [0, 1], WRONG_CSR),
        ([2, 3], [0, 3, 2], [0, 1], WRONG_CSR),
        ([2, 3], [0, 1, 2], [0, 3], WRONG_CSR),
        ([2, 3], [0, 1, 2], [-1, 1], WRONG_CSR),
        ([2, 3], [0, 1, 2], [0], WRONG_CSR),
        ([2, 3], [0, 2, 2], [1, 1], "the CSR indices name a place of the matrix twice"),
        ([-2, 3], [0, 1, 2], [0, 1], "the CSR indices do not describe a -2 x 3 matrix"),
    ],
)
def test_wrong_compressed_rows_are_refused(shape: Any, crow: Any, col: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        TensorData([5, 6], "int64", shape, crow, col)


def test_parameters_and_attributes_are_the_protocols() -> None:
    parameters = list(inspect.signature(TensorData).parameters.values())
    names = ["data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"]
    assert [p.name for p in parameters] == names
    assert [p.default for p in parameters] == [inspect.Parameter.empty, None, None, None, None]
    tensor = TensorData([[1, 2]])
    assert (tensor.data, tensor.dtype, tensor.shape) == ([1, 2], "int64", [1, 2])


def test_an_unknown_keyword_raises() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'requires_grad'"):
        TensorData([1], requires_grad=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("again", [lambda t: pickle.loads(pickle.dumps(t)), TensorData])
def test_an_empty_integer_tensor_stays_one(again: Any) -> None:
    assert again(TensorData([], "int64")).dtype == "int64"


@pytest.mark.parametrize(
    "given",
    [np.array([2**63], np.uint64), np.array([1e30]), np.array([1j])],
    ids=["above-int64", "float-above-int64", "complex"],
)
def test_numbers_that_the_type_cannot_hold_are_refused(given: np.ndarray) -> None:
    with pytest.raises(InputError, match="TensorData"):
        TensorData(given, "int64" if given.dtype != complex else "float32")


@pytest.mark.parametrize(
    "arguments",
    [([1], "int64", [1.5]), ([1], "int64", 1), ([1], "int64", [1, 1], [0, [1]], [0])],
)
def test_odd_shapes_and_indices_are_refused_as_input(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError) as caught:
        TensorData(*arguments)
    assert str(caught.value).startswith("TensorData")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_tensor_of_torch_is_taken_as_the_dense_one() -> None:
    import torch

    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    for sparse in (dense.to_sparse_csr(), dense.to_sparse()):
        assert TensorData(sparse) == TensorData(dense)

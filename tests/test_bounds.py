"""The test of bounds.py: what it has to find, and what it has to let pass."""

import pytest
import torch
import triton
import triton.language as tl

from kernels._launch import launch
from tests.bounds import in_bounds
from tests.inputs import DEVICE, DTYPES, INTERPRET, laid_out, randn

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not INTERPRET, reason="only the interpreter's addresses can be seen"),
]


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, LOADED, STORED, stride_x, SHIFT, BLOCK: tl.constexpr):
    """One program copies N elements, and reads LOADED from SHIFT on."""
    offs = tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + (offs + SHIFT) * stride_x, mask=offs < LOADED, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < STORED)


def copy(x, loaded=10, stored=10, shift=0):
    buffer = torch.zeros(64, dtype=x.dtype, device=DEVICE)  # so that nothing real is overwritten
    y = buffer[16 : 16 + len(x)]
    with in_bounds():
        launch(copy_kernel, (1,), x, y, len(x), loaded, stored, x.stride(0), shift, BLOCK=16)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "offset", "expanded"])
def test_what_is_in_bounds_passes(layout, dtype):
    x = laid_out(randn(10, dtype=dtype), layout)
    assert torch.equal(copy(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "loaded, stored, shift, message",
    [
        (11, 10, 0, "1 of 11 elements read"),  # never stored: no NaN would be seen
        (16, 10, 0, "6 of 16 elements read"),
        (10, 10, -1, "1 of 10 elements read"),
        (10, 11, 0, "1 of 11 elements written"),
        (10, 10, 2**40, "10 of 10 elements read"),  # raised before the memory is touched
    ],
)
def test_what_is_out_of_bounds_does_not(loaded, stored, shift, message, dtype):
    buffer = randn(40, dtype=dtype)
    with pytest.raises(Exception, match=message):
        copy(buffer[15:25], loaded, stored, shift)


@triton.jit
def table_kernel(table_ptr, dtype_ptr, TENSORS, COUNT):
    """One program sets the first COUNT elements of TENSORS tensors to 1."""
    for i in range(0, TENSORS):
        x_ptr = tl.load(table_ptr + i).to(dtype_ptr.dtype)
        for j in range(0, COUNT):
            tl.store(x_ptr + j, 1.0)


def test_tables_of_addresses():
    """A list of tensors is passed as the table of their addresses: they are in bounds too."""
    buffers = [torch.zeros(8, device=DEVICE) for _ in range(2)]
    tensors = [b[:3] for b in buffers]
    with in_bounds():
        launch(table_kernel, (1,), tensors, tensors[0], 2, 3)
        with pytest.raises(Exception, match="1 of 1 elements written"):
            launch(table_kernel, (1,), tensors, tensors[0], 2, 4)
    assert [b.tolist() for b in buffers] == [[1, 1, 1, 0, 0, 0, 0, 0]] * 2

"""The two kernels that softmax and cross-entropy have for a row: in registers, and online."""

import contextlib

import pytest

from tilelab.kernels._tiles import use_tile

BOTH = {  # the same rows, of up to 16 elements
    "in registers": dict(BLOCK_M=16, BLOCK_N=16, num_warps=4),
    "online": dict(BLOCK_M=16, BLOCK_N=4, num_warps=4),
}
both_kernels = pytest.mark.parametrize("tile", BOTH.values(), ids=BOTH)


@contextlib.contextmanager
def with_tile(op, tile):
    """Forward and backward of `op` run with `tile`; with None, with the one they choose."""
    with contextlib.ExitStack() as stack:
        for name in (op, f"{op}_backward") if tile else ():
            stack.enter_context(use_tile(name, tile))
        yield

"""Every address that a kernel reads or writes, checked: the interpreter sees them all.

    with in_bounds():
        y = conv2d(x, weight)

poison.py finds a read out of bounds by the NaN that it brings into a result. Where a value is read
and never stored (of rows past the last one, say) it brings none, but a GPU may fault on it. So
this looks at the addresses: each whose mask is set has to lie within a tensor that this launch was
given, from its first element to its last. Compiled for a GPU there is nothing to look at.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from kernels import _launch


class _Spans:
    """The memory of some tensors, as disjoint intervals of addresses in ascending order."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        merged: list[list[int]] = []
        for first, last in sorted(map(_span, tensors)):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(last, merged[-1][1])
            else:
                merged.append([first, last])
        self.first, self.last = np.array(merged or [[0, 0]], dtype=np.uint64).T

    def contain(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Whether each element of `size` bytes does."""
        at = np.searchsorted(self.first, addresses, side="right")
        return (at > 0) & (addresses + np.uint64(size) <= self.last[at - 1])


def _span(x: torch.Tensor) -> tuple[int, int]:
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


@contextlib.contextmanager
def in_bounds() -> Iterator[None]:
    """Raise for the first address that is in no tensor of its launch. See above."""
    if not _launch.INTERPRET:
        yield
        return
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    listed: list[torch.Tensor] = []  # whose addresses the next launch gets in a table
    spans = _Spans([])

    def addresses(tensors, original=_launch._addresses):
        listed.extend(tensors)
        return original(tensors)

    def call(self, *args, original=executor.__call__, **kwargs):
        nonlocal spans
        given = [getattr(a, "base", a) for a in (*args, *kwargs.values())]  # of a descriptor
        spans = _Spans(listed + [a for a in given if isinstance(a, torch.Tensor)])
        listed.clear()
        return original(self, *args, **kwargs)

    def check(what, ptrs, mask):
        used = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.uint64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        wrong = used[~spans.contain(used, size)]
        if len(wrong):
            raise AssertionError(f"out of bounds: {len(wrong)} of {len(used)} elements {what}")

    def load(self, ptrs, mask, *rest, original=builder.create_masked_load):
        check("read", ptrs, mask)
        return original(self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest, original=builder.create_masked_store):
        check("written", ptrs, mask)
        return original(self, ptrs, value, mask, *rest)

    with (
        mock.patch.object(_launch, "_addresses", addresses),
        mock.patch.object(executor, "__call__", call),
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield

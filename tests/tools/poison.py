"""Catches reads and writes out of bounds: every tensor a kernel sees lies in a poisoned buffer.

    with poison() as p:
        c = matmul(p(a), p(b))
    assert_close(c, ...)

`p(x)` is `x` at the same strides inside a larger buffer of NaN. What the files of kernels/ allocate
meanwhile (torch.empty and its kin) lies in such a buffer too, and begins as NaN. So

    a read out of bounds             brings NaN into the result; the interpreter is watched too, and
                                     no load may return NaN, even if nothing comes of it
    a write out of bounds            changes the poison around a tensor
    an element that is not written   is still NaN

and leaving the context checks all of it, bit for bit. The poison of integers is 0xA5 in each byte.
test_tolerance.py plants one bug of each kind and shows that it is caught.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from tests.tools.inputs import INTERPRET

# what allocates; the buffer of one that fills starts with its values and not with poison
ALLOCATORS = [
    (torch, ["empty", "empty_like", "empty_strided"]),
    (torch, ["zeros", "zeros_like", "ones", "full", "full_like"]),
    (torch.Tensor, ["new_empty", "new_empty_strided", "new_zeros", "new_full"]),
]


@dataclass
class _Guarded:
    kind: str  # "input": nothing may change; "written": all but the inside; "output": see above
    inside: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor  # a copy of the buffer


class Poison:
    """The tensors under guard. Calling it embeds one; `check` raises AssertionError."""

    def __init__(self, nan_results: bool) -> None:
        self.nan_results = nan_results
        self.guarded: list[_Guarded] = []
        self.bad_loads: list[str] = []

    def __call__(self, x: torch.Tensor, written: bool = False) -> torch.Tensor:
        """`x` in a poisoned buffer; `written` where the kernel is meant to write to it."""
        return self.embed(x, "written" if written else "input", copy=True)

    def embed(self, x: torch.Tensor, kind: str, copy: bool) -> torch.Tensor:
        if x.numel() == 0:
            return x
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        margin = extent + 64 + -extent % 64  # more than a row, and 16-byte alignment stays
        buffer = torch.empty(2 * margin + extent + 64, dtype=x.dtype, device=x.device)
        if x.is_floating_point():
            buffer.fill_(torch.nan)
        else:
            buffer.view(torch.uint8).fill_(0xA5)
        offset = margin + x.storage_offset() % 16
        inside = torch.empty(0, dtype=x.dtype, device=x.device)
        inside.set_(buffer.untyped_storage(), offset, x.shape, x.stride())
        if copy:
            dense = tuple(slice(0, 1 if s == 0 else None) for s in x.stride())
            inside[dense].copy_(x.detach()[dense])
        self.guarded.append(_Guarded(kind, inside, buffer, buffer.clone()))
        return inside

    def check(self) -> None:
        """Raise AssertionError for what was read, written, or left unwritten against the rules."""
        if self.bad_loads:
            raise AssertionError(f"out of bounds, or before it was written: {self.bad_loads[0]}")
        outputs = 0
        for g in self.guarded:
            what = f"an {g.kind}" if g.kind != "written" else "a tensor to be written"
            what += f" of shape {list(g.inside.shape)}"
            outputs += g.kind != "input"
            if g.kind != "input":  # the inside may differ
                expected = torch.empty(0, dtype=g.before.dtype, device=g.before.device)
                expected.set_(
                    g.before.untyped_storage(),
                    g.inside.storage_offset(),
                    g.inside.shape,
                    g.inside.stride(),
                )
                expected.copy_(g.inside)
            now, before = (t.view(torch.uint8).view(len(t), -1) for t in (g.buffer, g.before))
            changed = (now != before).any(dim=1).nonzero().flatten()
            if len(changed):
                where = "of" if g.kind == "input" else "outside of"
                raise AssertionError(
                    f"out of bounds: {len(changed)} elements {where} {what} were overwritten, the "
                    f"first at {int(changed[0]) - g.inside.storage_offset()} from its first element"
                )
            if g.kind == "output" and not (g.inside.is_floating_point() and self.nan_results):
                self._check_inside(g, what)
        assert outputs, "nothing was allocated by the watched files: the test proves nothing"

    def _check_inside(self, g: _Guarded, what: str) -> None:
        if g.inside.is_floating_point():
            left = g.inside.isnan()
        else:
            poison = torch.full((g.inside.element_size(),), 0xA5, dtype=torch.uint8)
            left = g.inside == poison.view(g.inside.dtype).to(g.inside.device)
        if left.any():
            raise AssertionError(
                f"poison in {what}: {int(left.sum())} elements were not written, or came from a "
                f"read out of bounds, the first at {left.nonzero()[0].tolist()}"
            )


@contextlib.contextmanager
def poison(nan_results: bool = False, watch: str = "tilelab.kernels.") -> Iterator[Poison]:
    """Guard what is embedded by the yielded object, and what the files of kernels/ allocate.

    Args:
        nan_results: NaN is a right value here, so do not look for poison in what is loaded, nor in
            floating outputs.
        watch: how the names of the modules begin whose allocations are guarded.
    """
    guard = Poison(nan_results)
    with contextlib.ExitStack() as stack:
        for owner, names in ALLOCATORS:
            for name in names:
                if hasattr(owner, name):
                    copy = "empty" not in name
                    patched = _embedding(guard, getattr(owner, name), watch, copy)
                    stack.enter_context(mock.patch.object(owner, name, patched))
        if INTERPRET and not nan_results:
            module = (
                interpreter._interpreter
            )  # NumPy's arrays of addresses go in, of values come out
            patched = _watching(guard, module.load)
            stack.enter_context(mock.patch.object(module, "load", patched))
        yield guard
    guard.check()


def _embedding(guard: Poison, allocate: Callable, watch: str, copy: bool) -> Callable:
    def allocated(*args, **kwargs):
        x = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return guard.embed(x, "output", copy) if caller.startswith(watch) else x

    return allocated


def _watching(guard: Poison, load: Callable) -> Callable:
    def loaded(addresses, mask, other, dtype):
        values = load(addresses, mask, other, dtype)
        if np.issubdtype(values.dtype, np.floating):
            poisoned = int((np.isnan(values) & mask).sum())
            if poisoned:
                guard.bad_loads.append(f"a load of {list(values.shape)} read {poisoned} elements")
        return values

    return loaded

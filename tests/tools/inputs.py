"""Inputs for the tests: seeded values in every memory layout, and gradients for a given dy."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tilelab.kernels import _launch

INTERPRET = _launch.INTERPRET
DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "transposed", "channels_last", "sliced", "offset", "expanded"]


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    device: str = DEVICE,
) -> torch.Tensor:
    """Normally distributed values: the same for the same shape and seed on every machine.

    Args:
        shape: as in torch.randn.
        dtype: of the result.
        layout: how it lies in memory, see `laid_out`.
        seed: two inputs of one test need two seeds, or they would be equal.
        device: of the result.
    """
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    return laid_out(x.to(device=device, dtype=dtype), layout)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x` in another memory layout; "expanded" alone changes values: row 0 becomes every row.

    contiguous      row-major
    transposed      the last dimension has the largest stride, the first is the densest
    channels_last   as torch's channels_last, for any rank: dim 1 is the densest
    sliced          every second element of a larger buffer, along every dimension
    offset          row-major, but the first element is not aligned to 16 bytes
    expanded        the first dimension has stride 0
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        dims = list(range(x.dim()))[::-1]
        return x.permute(dims).contiguous().permute(dims)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    between = torch.nan if x.is_floating_point() else 93
    if layout == "sliced":
        buffer = x.new_full([2 * size for size in x.shape], between)
        view = buffer[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    if layout == "offset":
        buffer = x.new_full([x.numel() + 1], between)
        view = buffer[1:].view(x.shape)
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def double(*tensors: Any) -> Any:
    """The float64 twins, for the reference; what is no floating tensor stays as it is.

    Contiguous: some of torch's own gradients refuse other layouts (slow_conv2d of a weight's).
    """
    twins = [
        x.detach().double().contiguous()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in tensors
    ]
    return twins[0] if len(twins) == 1 else twins


def gradients(
    fn: Callable[..., torch.Tensor], inputs: Sequence[Any], dy: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`fn(*inputs)` and the gradients by its floating tensors, for the output gradient `dy`.

    y, (da, db) = gradients(matmul, [a, b], dc)
    y64, (da64, db64) = gradients(reference, double(a, b), double(dc))
    """
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    y = fn(*leaves)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    return y.detach(), list(torch.autograd.grad(y, wanted, dy))


def need_memory(gib: float) -> None:
    """Skip the test on a GPU that has less memory free."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")

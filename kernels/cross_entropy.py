"""Cross-entropy of logits and class indices, in one pass over the logits, and its gradient.

    p       = softmax(x) over the C classes
    q       = the target: 1 - eps at class t, plus eps / C at every class (label smoothing)
    loss    = -sum of q * log p = lse - x[t] - eps * mean of (x - x[t])     lse = log sum exp(x)
    dx      = (p - q) * g       g = the gradient that arrives for this row's loss

                  C classes
         +---------------------+     loss  kept      forward: one program owns BLOCK_M rows of
         |                     |      +-+  +--+      logits. It reads them once and keeps two
     M   |#####################| ->   |#|  |##|      numbers per row: m and 1 / sum exp(x - m).
         |          @@         |      +-+  +--+      backward: these two numbers give p for each
         +---------------------+                     element alone. One program owns a tile (@).

Rows that are too long for the registers take the online form of softmax.py in the forward. The
backward does not care how long the rows are.

What to keep. The backward needs p, which has as many elements as the logits: n = M*C, of e bytes.
To keep p costs ne bytes to write it and ne to read it. To read the logits again costs ne, and they
are in memory anyway. So the forward keeps only two float32 numbers per row (m is the maximum, as in
softmax.py). The one number lse would do too. But p = exp(x - lse) would take over the rounding
error of lse as a relative error, and near 1,000 neighbouring float32 numbers are 6e-5 apart.

Memory traffic limits the speed. A training step should take half of torch's time:

    bytes moved      this file                  torch
    forward          ne    read x               2ne   log_softmax: read x, write log p
    backward         2ne   read x, write dx     4ne   ne to write -1 into zeros, 3ne for dx
    training step    3ne                        6ne

The forward needs about 4n FLOPs (maximum, subtraction, exp, sum): 2 FLOPs per byte in 16-bit.

Read first: softmax.py. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax
(2018); Liger-Kernel and llm.c, which write the gradient in the forward pass.
"""

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import (
    check_choice,
    check_device,
    check_tensors,
    reduction_dtype,
    short_name,
)
from tilelab.kernels._launch import launch
from tilelab.kernels._rows import UNFUSED, as_rows, row_offsets
from tilelab.kernels._tiles import cdiv
from tilelab.kernels.softmax import LOG2_E, LOWEST, TILES, group, row_tile  # noqa: F401  the same tiles


def reference(logits, target, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """The same in plain torch, for any dtype."""
    dim = min(1, logits.dim() - 1)
    log_p = logits - logits.logsumexp(dim, keepdim=True)
    live = target != ignore_index
    index = torch.where(live, target, 0).unsqueeze(dim).long()
    nll = -log_p.gather(dim, index).squeeze(dim)
    loss = (1 - label_smoothing) * nll
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(dim)
    loss = torch.where(live, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / live.sum()


# The kernels share the tiles of softmax.py. Padding the classes can make their loads wider: with a
# vocabulary of 50,257, each row begins at another alignment and loads are 2 bytes wide. llm.c pads
# it to 50,304, a multiple of 16, and then the same kernel loads 16 bytes at a time.
#
# In 16-bit, instructions limit the forward in registers: it only reads, so it moves few bytes.
# An H200 has time for 99 instructions per 16 bytes (softmax.py derives this number).
#
#     instructions per 16 bytes moved,      forward          forward,            backward
#     compiled for sm_90 (H100, H200)       in registers     online, its loop
#     contiguous rows                       92 to 176        68                  48 to 70
#     strided rows                          238 to 272                           133


@triton.jit
def cross_entropy_kernel(
    x_ptr, t_ptr, loss_ptr, row_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2, stride_tn,
    SMOOTH: tl.constexpr, SKIP: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes the losses of BLOCK_M rows in registers: N <= BLOCK_N.

    With NEEDS_GRAD it also writes two numbers per row to row_ptr, [2, M]: m and 1 / s.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    t_ptrs = t_ptr + row_offsets(offs_m, D1, D2, stride_t0, stride_t1, stride_t2)
    t = tl.load(t_ptrs, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    live = mask_m & (t != ignore_index)
    valid = live & (t >= 0) & (t < N)  # A class out of range makes the row NaN.

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_t = tl.load(x_ptr + rows + t * stride_xn, mask=valid, other=float("nan")).to(tl.float32)
    x_ptrs = x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :]
    # SKIP: the classes of a row are neighbours in memory, and ignored rows are not read. Otherwise,
    # as in contiguous [N, C, H, W], one load has the pixels of several rows. It reads the ignored
    # ones too, and tl.where drops them: a mask per row would split the load.
    mask = (live if SKIP else mask_m)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    if not SKIP:
        x = tl.where(live[:, None], x, float("-inf"))

    m = tl.max(x, axis=1)
    x -= m[:, None]
    x_t -= m
    s = tl.sum(tl.exp2(x * LOG2_E), axis=1)
    loss = tl.log(s) - x_t
    if SMOOTH:
        mean = tl.sum(tl.where(mask_n[None, :], x - x_t[:, None], 0.0), axis=1) / N
        loss = tl.where(loss == float("inf"), loss, loss - smoothing * mean)  # Avoid inf - inf.
    loss = tl.where(live, loss, 0.0)
    tl.store(loss_ptr + offs_m, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)
    if NEEDS_GRAD:
        tl.store(row_ptr + offs_m, m, mask=mask_m)
        scale = tl.where(valid, 1.0 / s, tl.where(live, float("nan"), 0.0))
        tl.store(row_ptr + M + offs_m, scale, mask=mask_m)


@triton.jit
def cross_entropy_online_kernel(
    x_ptr, t_ptr, loss_ptr, row_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2, stride_tn,
    SMOOTH: tl.constexpr, SKIP: tl.constexpr, NEEDS_GRAD: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes the same for BLOCK_M rows of any length, online as in softmax.py."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    t_ptrs = t_ptr + row_offsets(offs_m, D1, D2, stride_t0, stride_t1, stride_t2)
    t = tl.load(t_ptrs, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    live = mask_m & (t != ignore_index)
    valid = live & (t >= 0) & (t < N)

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_t = tl.load(x_ptr + rows + t * stride_xn, mask=valid, other=float("nan")).to(tl.float32)
    x_rows = x_ptr + rows[:, None]
    m = tl.full((BLOCK_M, BLOCK_N // GROUP), LOWEST, tl.float32)  # one m and s per group
    s = tl.full((BLOCK_M, BLOCK_N // GROUP), 0.0, tl.float32)
    others = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for n in range(0, N, BLOCK_N):
        offs = n + offs_n
        mask = (live if SKIP else mask_m)[:, None] & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_rows + (offs * stride_xn)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        if not SKIP:
            x = tl.where(live[:, None], x, float("-inf"))
        if SMOOTH:
            others += tl.where(mask, x - x_t[:, None], 0.0)
        x = tl.reshape(x, (BLOCK_M, BLOCK_N // GROUP, GROUP))
        m_new = tl.maximum(m, tl.max(x, axis=2))
        e = tl.exp2((x - m_new[:, :, None]) * LOG2_E)
        s = s * tl.exp2((m - m_new) * LOG2_E) + tl.sum(e, axis=2)
        m = m_new
    top = tl.max(m, axis=1)  # [BLOCK_M]
    total = tl.sum(s * tl.exp2((m - top[:, None]) * LOG2_E), axis=1)
    loss = tl.log(total) - (x_t - top)
    if SMOOTH:
        mean = tl.sum(others, axis=1) / N
        loss = tl.where(loss == float("inf"), loss, loss - smoothing * mean)
    loss = tl.where(live, loss, 0.0)
    tl.store(loss_ptr + offs_m, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)
    if NEEDS_GRAD:
        tl.store(row_ptr + offs_m, top, mask=mask_m)
        scale = tl.where(valid, 1.0 / total, tl.where(live, float("nan"), 0.0))
        tl.store(row_ptr + M + offs_m, scale, mask=mask_m)


# Why not write the gradient in the forward, as llm.c does? The loss is the end of its program, so g
# is 1, and fused_classifier moves 2ne bytes in all. Autograd may hand down any g. The host cannot
# see that a g on the GPU is 1 without waiting for the GPU. So p - q, written in the forward (2ne),
# would have to be read, scaled and written once more: 4ne instead of the 3ne here.


@triton.jit
def cross_entropy_backward_kernel(
    x_ptr, t_ptr, g_ptr, row_ptr, dx_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2, stride_tn,
    stride_g0, stride_g1, stride_g2, stride_gn, stride_dx0, stride_dx1, stride_dx2, stride_dxn,
    SMOOTH: tl.constexpr, SKIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of dx = (p - q) * g. No row is summed: m and 1 / s are known."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, (offs_n < N)[None, :]
    t_ptrs = t_ptr + row_offsets(offs_m, D1, D2, stride_t0, stride_t1, stride_t2)
    t = tl.load(t_ptrs, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    live = mask_m & (t != ignore_index)
    g_ptrs = g_ptr + row_offsets(offs_m, D1, D2, stride_g0, stride_g1, stride_g2)
    g = tl.load(g_ptrs, mask=live, other=0.0)  # float32
    m = tl.load(row_ptr + offs_m, mask=live, other=0.0)
    scale = tl.load(row_ptr + M + offs_m, mask=live, other=0.0)

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_ptrs = x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :]
    x = tl.load(x_ptrs, mask=(live if SKIP else mask_m)[:, None] & mask_n, other=0.0)
    x = x.to(tl.float32) if SKIP else tl.where(live[:, None], x, 0.0).to(tl.float32)
    e = tl.exp2((x - m[:, None]) * LOG2_E)  # [BLOCK_M, BLOCK_N]

    # Two things are the same for a whole row, so compute them once per row: scale * g, because
    # p * g = e * (scale * g); and the column of its class in this tile, or -1 if it is in none.
    # An ignored row gets dx = 0. Its g was not loaded: it is 1 / 0 where all rows are ignored.
    t -= tl.program_id(1).to(tl.int64) * BLOCK_N
    column = tl.where(live & (t >= 0) & (t < BLOCK_N), t, -1).to(tl.int32)
    here = tl.arange(0, BLOCK_N)[None, :] == column[:, None]
    rest = g * (smoothing / N) if SMOOTH else tl.full((BLOCK_M,), 0.0, tl.float32)
    q = tl.where(here, (rest + g * (1.0 - smoothing))[:, None], rest[:, None])
    dx = e * (scale * g)[:, None] - q
    rows = row_offsets(offs_m, D1, D2, stride_dx0, stride_dx1, stride_dx2)
    dx_ptrs = dx_ptr + rows[:, None] + (offs_n * stride_dxn)[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n)


def _class_dim(logits: torch.Tensor) -> int:
    return min(1, logits.dim() - 1)


def _check_target(logits: torch.Tensor, target: torch.Tensor) -> None:
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target must be class indices, int64 or int32, got {short_name(target.dtype)}"
        )
    check_device("target", target, "logits", logits)
    if not 1 <= logits.dim() <= 4:
        raise ValueError(f"logits must have 1 to 4 dimensions, got {list(logits.shape)}")
    rows = list(logits.shape)
    del rows[_class_dim(logits)]
    if list(target.shape) != rows:
        raise ValueError(
            f"target must have logits' shape without its classes, {rows}, got {list(target.shape)}"
        )


def _check_classes(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raise if a class index is out of range; do not check on a GPU, where the host would wait."""
    if target.device.type != "cpu":
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if len(wrong):
        raise ValueError(
            f"target must have class indices from 0 to {classes - 1} or ignore_index "
            f"({ignore_index}), got {wrong[0].item()}"
        )


@torch.library.custom_op("tilelab::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, two numbers per row (empty unless needs_grad), and the weight of a row."""
    dim = _class_dim(logits)
    _check_classes(target, logits.shape[dim], ignore_index)
    losses = torch.empty(
        target.shape, dtype=dtype if reduction == "none" else torch.float32, device=logits.device
    )
    D0, D1, D2, N, *strides = as_rows(dim, logits, target.unsqueeze(dim))
    M = D0 * D1 * D2
    kept = losses.new_empty((2, M) if needs_grad else 0, dtype=torch.float32)
    tile = row_tile("cross_entropy", logits, M, N, strides[3])
    online = N > tile["BLOCK_N"]
    launch(
        cross_entropy_online_kernel if online else cross_entropy_kernel,
        (cdiv(M, tile["BLOCK_M"]),), logits, target, losses, kept, M, N, D1, D2,
        ignore_index, label_smoothing, *strides,
        SMOOTH=label_smoothing > 0, SKIP=strides[3] == 1, NEEDS_GRAD=needs_grad,
        **(group(logits, tile, strides[3]) if online else {}), **tile, **UNFUSED,
    )  # fmt: skip
    if reduction == "none":
        return losses, kept, kept.new_empty(0)  # No weight is needed.
    # Torch adds up the losses. They are few, the order of the sum is the same in every call, and
    # the host does not wait for the GPU.
    weight = torch.ones((), dtype=torch.float32, device=logits.device)
    if reduction == "mean":
        weight = weight / (target != ignore_index).sum()
    return (losses.sum() * weight).to(dtype), kept, weight


@_cross_entropy.register_fake
def _(logits, target, ignore_index, label_smoothing, reduction, dtype, needs_grad):
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    kept = logits.new_empty((2, target.numel()) if needs_grad else 0, dtype=torch.float32)
    weight = logits.new_empty(0 if reduction == "none" else (), dtype=torch.float32)
    return loss, kept, weight


@torch.library.custom_op("tilelab::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    kept: torch.Tensor,
    g: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """Return (p - q) * g. g is float32 and has target's shape."""
    dx, dim = torch.empty_like(logits), _class_dim(logits)
    D0, D1, D2, N, *strides = as_rows(dim, logits, target.unsqueeze(dim), g.unsqueeze(dim), dx)
    M = D0 * D1 * D2
    tile = row_tile("cross_entropy_backward", logits, M, N, strides[3])
    launch(
        cross_entropy_backward_kernel, (cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"])),
        logits, target, g, kept, dx, M, N, D1, D2, ignore_index, label_smoothing, *strides,
        SMOOTH=label_smoothing > 0, SKIP=strides[3] == 1, **tile,
    )  # fmt: skip
    return dx


@_cross_entropy_backward.register_fake
def _(logits, target, kept, g, ignore_index, label_smoothing):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    logits, target, *ctx.options, ctx.reduction = inputs[:5]
    ctx.save_for_backward(logits, target, *output[1:])
    ctx.set_materialize_grads(False)  # Otherwise torch makes zeros for kept and weight.


def _autograd(ctx, dloss, _kept, _weight):
    logits, target, kept, weight = ctx.saved_tensors
    g = dloss.float()
    if ctx.reduction != "none":
        g = (g * weight).expand(target.shape)  # All rows share one number, at stride 0.
    dx = _cross_entropy_backward(logits, target, kept, g, *ctx.options)
    return dx, None, None, None, None, None, None


_cross_entropy.register_autograd(_autograd, setup_context=_setup_context)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Compute the cross-entropy of logits and class indices in float32, differentiable in logits.

    Args:
        logits: [C], [N, C], [N, C, L] or [N, C, H, W] for C classes; float32, float16 or bfloat16;
            any strides.
        target: the class of each row, in logits' shape without C; int64 or int32; any strides.
        ignore_index: rows with this target have loss 0 and gradient 0, and "mean" leaves them out.
        label_smoothing: the part of the target that is spread over all classes, from 0 to 1.
        reduction: "none" returns the loss of each row, "sum" their sum, "mean" their mean. The mean
            is NaN if all rows are ignored.

    Returns:
        The loss in nats, in logits' dtype. Under `torch.autocast` it is float32, as in torch.

    Raises:
        TypeError: a dtype or device is not supported, or the devices differ.
        ValueError: the shapes do not fit, label_smoothing is out of range, reduction is unknown, or
            a class does not exist. On a GPU the host would have to wait to find such a class, so
            nothing is raised: the loss and the gradient of its row are NaN.

    Source: torch.nn.functional.cross_entropy.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    check_tensors(logits=logits)
    _check_target(logits, target)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, int | float):
        raise TypeError(f"label_smoothing must be a float, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing!r}")
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    return _cross_entropy(
        logits, target, ignore_index, float(label_smoothing), reduction, reduction_dtype(logits),
        needs_grad,
    )[0]  # fmt: skip

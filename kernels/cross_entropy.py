"""Cross-entropy of logits and class indices: a loss in one pass over the logits, and its gradient.

    p       = softmax(x) over the C classes
    q       = the target: 1 - eps at class t, and eps / C more at every class (label smoothing)
    loss    = -sum of q * log p = lse - x[t] - eps * (mean of x - x[t])     lse = log sum exp(x)
    dx      = (p - q) * g       g = what comes down for this row's loss

                  C classes
         +---------------------+     loss  kept      forward: one program owns BLOCK_M rows of
         |                     |      +-+  +--+      logits, reads them once, and keeps two numbers
     M   |#####################| ->   |#|  |##|      of each: its maximum m and 1 / sum exp(x - m).
         |          @@         |      +-+  +--+      backward: with these, p is known element by
         +---------------------+                     element, and one program owns a tile (@).

What to keep. The backward needs p, which is as large as the logits. To keep p costs ne to write it
and ne to read it; to read the logits again, which are in memory anyway, costs ne. So nothing is
kept but two float32 a row. (Of the logarithm lse alone there would be one: but p = exp(x - lse) has
lse's rounding error as its relative error, which is 1e-4 where the logits are some 1,000.)

What limits it: memory. With n = M*C elements of e bytes, counted as in softmax.py:

    forward                                ne     torch: log_softmax 2ne (read x, write log p)
    backward: read x, write dx            2ne     torch: ne to scatter -1 into zeros, 3ne for dx
                                          ---
    a training step                       3ne     torch: 6ne; so it should take half the time

llm.c, whose loss is the end of the program, has nothing to scale by: its fused_classifier writes
the gradient in the forward pass, 2ne in all. Autograd may hand down anything, and a GPU cannot tell
the host that it was 1 without making it wait: p - q written in the forward pass would have to be
read and written once more to be scaled, 4ne. Rows too long for the registers are walked along once,
online as in softmax.py, and the backward does not care how long they are.

With a vocabulary of 50,257 each row begins at another alignment, and loads are 2 bytes wide; padded
to 50,304, a multiple of 16, as llm.c has it, the same kernel loads 16 bytes at a time. Of rows that
lie side by side (contiguous [N, C, H, W]) one load has pixels of eight rows: so there the ignored
ones are read, and dropped afterwards. Elsewhere they are not read at all.

In 16-bit instructions are near: compiled for sm_90, the forward of rows in registers issues 92 to
180 for each 16-byte load of a thread, and an H200 has time for 99. Reading alone is too fast for
it. It is not for the forward of a vocabulary (68 in its loop) and for the backward (48 to 70).

Read first: softmax.py. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax
(2018); Liger-Kernel and llm.c, which write the gradient in the forward pass.
"""

import torch
import triton
import triton.language as tl
from tilelab.kernels._checks import check_choice, check_device, check_tensors, reduction_dtype
from tilelab.kernels._launch import launch
from tilelab.kernels._rows import as_rows, row_offsets
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


@triton.jit
def cross_entropy_kernel(
    x_ptr, t_ptr, loss_ptr, row_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2, stride_tn,
    SMOOTH: tl.constexpr, SKIP: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes the losses of BLOCK_M rows in registers: N <= BLOCK_N.

    With NEEDS_GRAD it also keeps two numbers a row, [2, M]: m, and what exp(x - m) is scaled by.
    With SKIP, of an ignored row no byte of the logits is read.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    t_ptrs = t_ptr + row_offsets(offs_m, D1, D2, stride_t0, stride_t1, stride_t2)
    t = tl.load(t_ptrs, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    live = mask_m & (t != ignore_index)
    valid = live & (t >= 0) & (t < N)  # a class that is none makes the row NaN

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_t = tl.load(x_ptr + rows + t * stride_xn, mask=valid, other=float("nan")).to(tl.float32)
    x_ptrs = x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :]
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
        loss = tl.where(loss == float("inf"), loss, loss - smoothing * mean)  # not inf - inf
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
    """One program computes the same for BLOCK_M rows of any length, as in softmax.py."""
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
    m = tl.full((BLOCK_M, BLOCK_N // GROUP), LOWEST, tl.float32)  # a maximum and a sum a group
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


@triton.jit
def cross_entropy_backward_kernel(
    x_ptr, t_ptr, g_ptr, row_ptr, dx_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2, stride_tn,
    stride_g0, stride_g1, stride_g2, stride_gn, stride_dx0, stride_dx1, stride_dx2, stride_dxn,
    SMOOTH: tl.constexpr, SKIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of dx = (p - q) * g: with m and s known, no row is summed up."""
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

    # What is the same for a row is computed once: p * g = e * (scale * g), and which column of this
    # tile is its class, -1 for none. Of an ignored row all is 0, even where g is 1 / 0 since there
    # are no others.
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
            f"target must be class indices, int64 or int32, got {str(target.dtype)[6:]}"
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
    """The class indices are in range. On a GPU that would make the host wait: it is left out."""
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
    """Return the loss, two numbers a row for the backward (none unless needed), a row's weight."""
    dim = _class_dim(logits)
    _check_classes(target, logits.shape[dim], ignore_index)
    losses = torch.empty(
        target.shape, dtype=dtype if reduction == "none" else torch.float32, device=logits.device
    )
    D0, D1, D2, N, *strides = as_rows(dim, logits, target.unsqueeze(dim))
    M = D0 * D1 * D2
    kept = losses.new_empty((2, M) if needs_grad else 0, dtype=torch.float32)
    tile = row_tile("cross_entropy", logits.dtype, M, N, strides[3])
    online = N > tile["BLOCK_N"]
    launch(
        cross_entropy_online_kernel if online else cross_entropy_kernel,
        (cdiv(M, tile["BLOCK_M"]),), logits, target, losses, kept, M, N, D1, D2,
        ignore_index, label_smoothing, *strides,
        SMOOTH=label_smoothing > 0, SKIP=strides[3] == 1, NEEDS_GRAD=needs_grad,
        **(group(logits, tile, strides[3]) if online else {}), **tile,
    )  # fmt: skip
    if reduction == "none":
        return losses, kept, kept.new_empty(0)  # no row has a weight
    # Sums by torch: of few numbers, in the same order each time, and nothing waits for the GPU.
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
    """Return (p - q) * g, for g in float32 and of target's shape."""
    dx, dim = torch.empty_like(logits), _class_dim(logits)
    D0, D1, D2, N, *strides = as_rows(dim, logits, target.unsqueeze(dim), g.unsqueeze(dim), dx)
    M = D0 * D1 * D2
    tile = row_tile("cross_entropy_backward", logits.dtype, M, N, strides[3])
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
    ctx.set_materialize_grads(False)  # or zeros would come for what is kept


def _autograd(ctx, dloss, _kept, _weight):
    logits, target, kept, weight = ctx.saved_tensors
    g = dloss.float()
    if ctx.reduction != "none":
        g = (g * weight).expand(target.shape)  # one number for all rows has stride 0
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
        target: the class of each row, of logits' shape without C; int64 or int32; any strides.
        ignore_index: rows of this class have no loss and no gradient, nor do they count.
        label_smoothing: from 0 to 1, the part of the target that is spread over all classes.
        reduction: "none" for each row's loss, "sum", or "mean" over the rows that count: NaN if
            there is none.

    Returns:
        The loss in nats, of logits' dtype; float32 under `torch.autocast`, as torch has it.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the two.
        ValueError: shapes that do not fit, a label_smoothing out of range, an unknown reduction,
            or a class that does not exist. On a GPU such a class is not looked for, since the host
            would have to wait: its row's loss and gradient are NaN.

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

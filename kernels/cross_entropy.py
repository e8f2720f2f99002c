"""Cross-entropy of logits and class indices: the loss and its gradient in one pass over the logits.

    p       = softmax(x) over the C classes
    q       = the target: 1 - eps at class t, and eps / C more at every class (label smoothing)
    loss    = -sum of q * log p = lse - x[t] - eps * (mean of x - x[t])     lse = log sum exp(x)
    dx      = (p - q) * what this row's loss weighs in the result

                  C classes
         +---------------------+       loss
         |                     |       +-+        one program owns BLOCK_M rows of logits: it reads
     M   |#####################|  -->  |#|        them once and writes their losses and, if they
         |                     |       +-+        are wanted, their gradients
         +---------------------+

In one pass. The softmax of a row is in registers when its loss is known, and the gradient is p - q:
so it is written there and then, and not by a backward pass that would read the row again. What only
the backward knows, the upstream gradient, is one factor a row; scaling by it comes last. Until then
p - q is as it is: divided by the number of rows, it would underflow in fp16, and no row has to know
how many others are ignored.

What limits it: memory. With n = M*C elements of e bytes, counted as in softmax.py:

    forward alone                          ne     torch: log_softmax 2ne (read x, write log p)
    with the gradient                     2ne
    backward: scale by what comes down    2ne     torch: ne to scatter -1 into zeros, 3ne for dx
                                          ---
    a training step                       4ne     torch: 6ne; so it should take two thirds

llm.c, whose loss is the end of the program, has nothing to scale by and moves 2ne. Autograd may
hand down anything, and a GPU cannot tell the host that it was 1 without making it wait. (A backward
that computes p again, from x and a saved lse, would move 3ne in all.) Rows too long for the
registers are walked along twice, as in softmax.py: ne more, if the L2 cache does not serve it.

With a vocabulary of 50,257 each row begins at another alignment, and loads are 2 bytes wide; padded
to 50,304, a multiple of 16, as llm.c has it, the same kernel loads 16 bytes at a time.

Read first: softmax.py. Sources: Milakov and Gimelshein, Online normalizer calculation for softmax
(2018); the gradient written by the forward pass: llm.c's fused_classifier and Liger-Kernel.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import cdiv, check_choice, check_device, check_tensors, launch, reduction_dtype
from kernels._rows import as_rows, row_offsets
from kernels.softmax import LOWEST, TILES, row_tile  # noqa: F401  the same tiles for the same rows


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
    x_ptr, t_ptr, loss_ptr, dx_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2,
    stride_dx0, stride_dx1, stride_dx2, stride_dxn,
    SMOOTH: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes the losses, and p - q, of BLOCK_M rows in registers: N <= BLOCK_N."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    t_ptrs = t_ptr + row_offsets(offs_m, D1, D2, stride_t0, stride_t1, stride_t2)
    t = tl.load(t_ptrs, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    live = mask_m & (t != ignore_index)  # of an ignored row no byte of the logits is read
    valid = live & (t >= 0) & (t < N)  # a class that is none makes the row NaN

    rows = row_offsets(offs_m, D1, D2, stride_x0, stride_x1, stride_x2)
    x_t = tl.load(x_ptr + rows + t * stride_xn, mask=valid, other=float("nan")).to(tl.float32)
    x_ptrs = x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :]
    mask = live[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)

    m = tl.max(x, axis=1)
    x -= m[:, None]
    x_t -= m
    e = tl.exp(x)
    s = tl.sum(e, axis=1)
    loss = tl.log(s) - x_t
    if SMOOTH:
        mean = tl.sum(tl.where(mask_n[None, :], x - x_t[:, None], 0.0), axis=1) / N
        loss = tl.where(loss == float("inf"), loss, loss - smoothing * mean)  # not inf - inf
    loss = tl.where(live, loss, 0.0)
    tl.store(loss_ptr + offs_m, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)

    if NEEDS_GRAD:
        scale = tl.where(valid, 1.0 / s, float("nan"))
        dx = e * scale[:, None] - tl.where(offs_n[None, :] == t[:, None], 1.0 - smoothing, 0.0)
        if SMOOTH:
            dx -= smoothing / N
        dx = tl.where(live[:, None], dx, 0.0)
        rows = row_offsets(offs_m, D1, D2, stride_dx0, stride_dx1, stride_dx2)
        dx_ptrs = dx_ptr + rows[:, None] + (offs_n * stride_dxn)[None, :]
        mask = mask_m[:, None] & mask_n[None, :]  # of an ignored row, the zeros
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy_online_kernel(
    x_ptr, t_ptr, loss_ptr, dx_ptr, M, N, D1, D2, ignore_index, smoothing,
    stride_x0, stride_x1, stride_x2, stride_xn, stride_t0, stride_t1, stride_t2,
    stride_dx0, stride_dx1, stride_dx2, stride_dxn,
    SMOOTH: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes the same for rows of any length: it walks along them twice for p - q."""
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
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    s = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)  # a sum a column: added up once, at the end
    others = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for n in range(0, N, BLOCK_N):
        offs = n + offs_n
        mask = live[:, None] & (offs < N)[None, :]  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_rows + (offs * stride_xn)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        s = s * tl.exp(m - m_new)[:, None] + tl.exp(x - m_new[:, None])
        if SMOOTH:
            others += tl.where(mask, x - x_t[:, None], 0.0)
        m = m_new
    total = tl.sum(s, axis=1)  # [BLOCK_M]
    loss = tl.log(total) - (x_t - m)
    if SMOOTH:
        mean = tl.sum(others, axis=1) / N
        loss = tl.where(loss == float("inf"), loss, loss - smoothing * mean)
    loss = tl.where(live, loss, 0.0)
    tl.store(loss_ptr + offs_m, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)

    if NEEDS_GRAD:
        scale = tl.where(valid, 1.0 / total, float("nan"))[:, None]
        rows = row_offsets(offs_m, D1, D2, stride_dx0, stride_dx1, stride_dx2)
        dx_rows = dx_ptr + rows[:, None]
        last = (N - 1) // BLOCK_N * BLOCK_N
        for n in range(0, N, BLOCK_N):  # backwards, as in softmax.py
            offs = last - n + offs_n
            mask_n = (offs < N)[None, :]
            x_ptrs = x_rows + (offs * stride_xn)[None, :]
            x = tl.load(x_ptrs, mask=live[:, None] & mask_n, other=float("-inf")).to(tl.float32)
            dx = tl.exp(x - m[:, None]) * scale
            dx -= tl.where(offs[None, :] == t[:, None], 1.0 - smoothing, 0.0)
            if SMOOTH:
                dx -= smoothing / N
            dx = tl.where(live[:, None], dx, 0.0)
            dx_ptrs = dx_rows + (offs * stride_dxn)[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n)


@triton.jit
def cross_entropy_backward_kernel(
    d_ptr, g_ptr, dx_ptr, M, N, D1, D2,
    stride_d0, stride_d1, stride_d2, stride_dn, stride_g0, stride_g1, stride_g2,
    stride_dx0, stride_dx1, stride_dx2, stride_dxn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program scales a tile of d = p - q by its rows' upstream gradients g."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # [BLOCK_M, BLOCK_N]
    g_ptrs = g_ptr + row_offsets(offs_m, D1, D2, stride_g0, stride_g1, stride_g2)
    g = tl.load(g_ptrs, mask=offs_m < M, other=0.0)  # float32

    rows = row_offsets(offs_m, D1, D2, stride_d0, stride_d1, stride_d2)
    d_ptrs = d_ptr + rows[:, None] + (offs_n * stride_dn)[None, :]
    d = tl.load(d_ptrs, mask=mask, other=0.0).to(tl.float32)
    # 0 stays 0: an ignored row has no gradient, even where g is 1 / 0 because all are ignored.
    dx = tl.where(d == 0.0, 0.0, d * g[:, None])
    rows = row_offsets(offs_m, D1, D2, stride_dx0, stride_dx1, stride_dx2)
    dx_ptrs = dx_ptr + rows[:, None] + (offs_n * stride_dxn)[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    """Return the loss, p - q (empty unless it is needed) and what each row weighs in the loss."""
    _check_classes(target, logits.shape[_class_dim(logits)], ignore_index)
    losses = torch.empty(
        target.shape, dtype=dtype if reduction == "none" else torch.float32, device=logits.device
    )
    d = torch.empty_like(logits) if needs_grad else logits.new_empty(0)
    xr, dr = (as_rows(x, _class_dim(x)) for x in (logits, d))
    tr = target[(None,) * (3 - target.dim())]
    D0, D1, D2, N = xr.shape
    M = D0 * D1 * D2
    tile = row_tile("cross_entropy", xr)
    kernel = cross_entropy_kernel if N <= tile["BLOCK_N"] else cross_entropy_online_kernel
    launch(
        kernel, (cdiv(M, tile["BLOCK_M"]),), logits, target, losses, d, M, N, D1, D2,
        ignore_index, label_smoothing, *xr.stride(), *tr.stride(), *dr.stride(),
        SMOOTH=label_smoothing > 0, NEEDS_GRAD=needs_grad, **tile,
    )  # fmt: skip
    # Sums by torch: of few numbers, in the same order each time, and nothing waits for the GPU.
    weight = torch.ones((), dtype=torch.float32, device=logits.device)
    if reduction == "none":
        return losses, d, weight
    if reduction == "mean":
        weight = weight / (target != ignore_index).sum()
    return (losses.sum() * weight).to(dtype), d, weight


@_cross_entropy.register_fake
def _(logits, target, ignore_index, label_smoothing, reduction, dtype, needs_grad):
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    d = torch.empty_like(logits) if needs_grad else logits.new_empty(0)
    return loss, d, logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("tilelab::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(d: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Scale d = p - q, row by row, by g (float32, of target's shape)."""
    dx = torch.empty_like(d)
    dr, dxr = (as_rows(x, _class_dim(x)) for x in (d, dx))
    gr = g[(None,) * (3 - g.dim())]
    D0, D1, D2, N = dr.shape
    M = D0 * D1 * D2
    tile = row_tile("cross_entropy_backward", dr)
    grid = (cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"]))
    launch(
        cross_entropy_backward_kernel, grid, d, g, dx, M, N, D1, D2,
        *dr.stride(), *gr.stride(), *dxr.stride(), **tile,
    )  # fmt: skip
    return dx


@_cross_entropy_backward.register_fake
def _(d, g):
    return torch.empty_like(d)


def _setup_context(ctx, inputs, output):
    ctx.target_shape = inputs[1].shape
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as the logits would come for d


def _autograd(ctx, dloss, _d, _weight):
    d, weight = ctx.saved_tensors
    g = (dloss.float() * weight).expand(ctx.target_shape)  # one number for all rows has stride 0
    return _cross_entropy_backward(d, g), None, None, None, None, None, None


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

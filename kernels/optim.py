"""SGD and AdamW: one launch updates all parameters of a network.

    SGD      g = grad + weight_decay * p                     (-grad with maximize, in AdamW too)
             m = momentum * m + (1 - dampening) * g          (m = g in the first step)
             p = p - lr * (g + momentum * m  if nesterov,  m  with momentum,  else g)

    AdamW    m = beta1 * m + (1 - beta1) * grad              step t = 1, 2, ...
             v = beta2 * v + (1 - beta2) * grad^2
             p = (1 - lr * weight_decay) * p  -  lr * m' / (sqrt(v') + eps)
             with m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t), which undo the start from zero

The arithmetic is easy, since every element is updated on its own. The lesson is the launch. A
network has some hundred parameters (tensors), most of them small. A kernel for each would take more
time to launch than to run, so one launch gets all of them. A kernel cannot take a list of tensors,
but it can take two tables. The addresses say where the tensors are, and the plan says which piece
belongs to which program:

    parameters    p0 [==========|==========|====]     p1 [===]     p2 [==========|=======]
    programs             0          1        2             3             4           5
    plan             (0, 0)     (0, 1)     (0, 2)        (1, 0)       (2, 0)      (2, 1)
                     parameter 0, its chunk 1

One program owns one chunk: BLOCK_M elements of a parameter, of its gradient and of its state (m, or
m and v). It looks up its row of the plan and then the addresses. From there on it is an ordinary
kernel.

What limits it: memory. The bytes for one element, of e bytes:

    SGD                  3e    read p, grad; write p
    SGD with momentum    5e    read p, grad, m; write p, m
    AdamW                7e    read p, grad, m, v; write p, m, v
    AdamW in torch       about 20e with a call for each operation

AdamW does about 15 FLOPs for these 7e bytes: half a FLOP per byte in float32.

Read first: bias_relu.py. Sources: Sutskever et al., On the importance of initialization and
momentum in deep learning (2013); Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019),
in the form of torch.optim.SGD and AdamW; Micikevicius et al., Mixed Precision Training (2018), for
float32 parameters. The tables are those of Apex's multi_tensor_apply.
"""

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import check_tensors
from tilelab.kernels._launch import launch, stream_of
from tilelab.kernels._tiles import choose_tile


def sgd_reference(p, grad, m, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    """Return p and m after one step, in plain torch, for any dtype. At the first step m is None."""
    g = grad + weight_decay * p
    if momentum == 0:
        return p - lr * g, m
    m = g if m is None else momentum * m + (1 - dampening) * g
    return p - lr * (g + momentum * m if nesterov else m), m


def adamw_reference(p, grad, m, v, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """Return p, m and v after step number t, in plain torch, for any dtype."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    update = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return (1 - lr * weight_decay) * p - lr * update, m, v


TILES = [
    # This is the default. Each thread has 8 elements, which are one 16-byte load in 16-bit.
    dict(BLOCK_M=1024, num_warps=4),
    dict(BLOCK_M=512, num_warps=2),  # small parameters: a shorter chunk wastes less
    dict(BLOCK_M=1024, num_warps=2),  # 16 elements per thread: twice the loads in flight
    dict(BLOCK_M=2048, num_warps=4),  # half as many look-ups of the plan and the addresses
    dict(BLOCK_M=2048, num_warps=8),  # half as many look-ups, 8 elements per thread
    dict(BLOCK_M=4096, num_warps=8),  # large parameters: fewest look-ups
]
DEFAULT = {2: TILES[0], 4: TILES[0]}

# No chunk is shorter than the most threads of a program: 8 warps of 64 on AMD (NVIDIA: of 32). With
# fewer elements than threads, two threads have the same element, and one of them stores it. p is
# updated in place, so the other may load the new p. It does not store what it makes of that, and
# yet it is a race. A longer chunk costs nothing: these threads would have nothing else to do.
LEAST = 512

# Loads have to be 16 bytes wide for the speed of memory, and two things stand in the way. The
# compiler cannot see that an address out of a table is a multiple of 16. So the host checks it
# (ALIGNED), and the kernel states it (`tl.multiple_of`). And a mask that may end anywhere splits a
# wide load into narrow ones. So full chunks are loaded without a mask.
#
# Mixed precision. The network uses a float32 parameter p as 16-bit numbers. Under autocast, every
# forward pass casts each parameter, and every backward pass casts its gradient back: two small
# launches per tensor. With `make_copies` nothing is cast, since the network runs on 16-bit copies.
# The kernel reads the copy's gradient and updates p and the state in float32. It then writes p,
# rounded, to the copy, while p is still in registers. AdamW moves as many bytes either way:
#
#     bytes per element
#     without copies    read 4 grad + 12 p, m, v    write 12 p, m, v             28
#     with copies       read 2 grad + 12 p, m, v    write 12 p, m, v + 2 copy    28
#
# The arithmetic is in float32. It rounds once, when p, m and v are stored in the parameter's dtype.


@triton.jit
def sgd_kernel(
    p_like_ptr, g_like_ptr, address_ptr, plan_ptr, lr, lr_ptr, momentum, keep, weight_decay, sign,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program computes one chunk of one parameter: the new p, m and copy.

    A row of addresses is p, grad, copy, m; p_like_ptr and g_like_ptr give their types. A row of the
    plan is as in _plan_of. If lr_ptr is not None, it holds the learning rate.
    """
    element: tl.constexpr = tl.pointer_type(p_like_ptr.dtype.element_ty)
    g_element: tl.constexpr = tl.pointer_type(g_like_ptr.dtype.element_ty)
    plan_ptr += tl.program_id(0).to(tl.int64) * 4
    address_ptr += tl.load(plan_ptr) * 4
    lanes = tl.arange(0, BLOCK_M)
    offs = tl.load(plan_ptr + 1) * BLOCK_M + lanes  # int64, [BLOCK_M]
    left = tl.load(plan_ptr + 2)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    p_ptr = tl.load(address_ptr).to(element)
    g_ptr = tl.load(address_ptr + 1).to(g_element)
    c_ptr = tl.load(address_ptr + 2).to(g_element)
    m_ptr = tl.load(address_ptr + 3).to(element)
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        c_ptr = tl.multiple_of(c_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
    p_ptrs, g_ptrs, c_ptrs, m_ptrs = p_ptr + offs, g_ptr + offs, c_ptr + offs, m_ptr + offs

    full = left >= BLOCK_M
    mask = lanes < left
    m = tl.full((BLOCK_M,), 0.0, p_like_ptr.dtype.element_ty)
    if full:  # 16-byte loads, since there is no mask
        p = tl.load(p_ptrs)
        g = tl.load(g_ptrs)
        if MOMENTUM:
            m = tl.load(m_ptrs)
    else:
        p = tl.load(p_ptrs, mask=mask, other=0.0)
        g = tl.load(g_ptrs, mask=mask, other=0.0)
        if MOMENTUM:
            m = tl.load(m_ptrs, mask=mask, other=0.0)

    p = p.to(tl.float32)
    g = sign * g.to(tl.float32) + weight_decay * p
    if MOMENTUM:
        m = momentum * m.to(tl.float32) + keep * g
        g = g + momentum * m if NESTEROV else m
    p -= lr * g

    p = p.to(p_like_ptr.dtype.element_ty)
    m = m.to(p_like_ptr.dtype.element_ty)
    if full:
        tl.store(p_ptrs, p)
        if MOMENTUM:
            tl.store(m_ptrs, m)
        if COPY:
            tl.store(c_ptrs, p.to(g_like_ptr.dtype.element_ty))
    else:
        tl.store(p_ptrs, p, mask=mask)
        if MOMENTUM:
            tl.store(m_ptrs, m, mask=mask)
        if COPY:
            tl.store(c_ptrs, p.to(g_like_ptr.dtype.element_ty), mask=mask)


# 1 - beta^t = 1 - exp(x), with x = t * log(beta). Just below 1, float32 rounds exp(x) to a multiple
# of 6e-8. Near x = 0, the difference is not much larger than that, and few of its digits would be
# right. So a series is used there: 1 - exp(x) = -x * (1 + x/2 * (1 + x/3 * (1 + ...))).


@triton.jit
def rest_of_power(log_beta, t):
    """Return 1 - beta^t to the precision of float32, for log(beta) < 0 and t >= 1."""
    x = log_beta * t
    near = 1 + x / 8
    near = 1 + x / 7 * near
    near = 1 + x / 6 * near
    near = 1 + x / 5 * near
    near = 1 + x / 4 * near
    near = 1 + x / 3 * near
    near = 1 + x / 2 * near
    return tl.where(x > -0.5, -x * near, 1 - tl.exp(x))


@triton.jit
def adamw_kernel(
    p_like_ptr, g_like_ptr, address_ptr, plan_ptr, ticket_ptr, lr, lr_ptr, t, log_beta1, log_beta2,
    beta1, rest1, beta2, rest2, eps, weight_decay, sign,
    COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program computes one chunk of one parameter: the new p, m, v and copy.

    A row of addresses is p, grad, copy, m, v, counter. If ticket_ptr is not None, t is the counter
    plus 1. rest1 and rest2 are 1 - beta1 and 1 - beta2. The other arguments are as in sgd_kernel.
    """
    element: tl.constexpr = tl.pointer_type(p_like_ptr.dtype.element_ty)
    g_element: tl.constexpr = tl.pointer_type(g_like_ptr.dtype.element_ty)
    plan_ptr += tl.program_id(0).to(tl.int64) * 4
    parameter = tl.load(plan_ptr)
    address_ptr += parameter * 6
    lanes = tl.arange(0, BLOCK_M)
    offs = tl.load(plan_ptr + 1) * BLOCK_M + lanes  # int64, [BLOCK_M]
    left = tl.load(plan_ptr + 2)
    p_ptr = tl.load(address_ptr).to(element)
    g_ptr = tl.load(address_ptr + 1).to(g_element)
    c_ptr = tl.load(address_ptr + 2).to(g_element)
    m_ptr = tl.load(address_ptr + 3).to(element)
    v_ptr = tl.load(address_ptr + 4).to(element)
    t_ptr = tl.load(address_ptr + 5).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        c_ptr = tl.multiple_of(c_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
    p_ptrs, g_ptrs, c_ptrs = p_ptr + offs, g_ptr + offs, c_ptr + offs
    m_ptrs, v_ptrs = m_ptr + offs, v_ptr + offs

    full = left >= BLOCK_M
    mask = lanes < left
    if full:
        p = tl.load(p_ptrs)
        g = tl.load(g_ptrs)
        m = tl.load(m_ptrs)
        v = tl.load(v_ptrs)
    else:
        p = tl.load(p_ptrs, mask=mask, other=0.0)
        g = tl.load(g_ptrs, mask=mask, other=0.0)
        m = tl.load(m_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)

    # These lines are the same for all elements of a chunk. They take some 70 instructions.
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    if ticket_ptr is not None:
        t = tl.load(t_ptr) + 1
    step_size = lr / rest_of_power(log_beta1, t)
    scale_v = 1 / tl.sqrt(rest_of_power(log_beta2, t))

    # 1 - beta comes from the host. From a float32 0.999 it would be off by 1e-5 of its value.
    p, g, m, v = p.to(tl.float32), sign * g.to(tl.float32), m.to(tl.float32), v.to(tl.float32)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = (1 - lr * weight_decay) * p - step_size * (m / (tl.sqrt(v) * scale_v + eps))

    p = p.to(p_like_ptr.dtype.element_ty)
    m = m.to(p_like_ptr.dtype.element_ty)
    v = v.to(p_like_ptr.dtype.element_ty)
    if full:
        tl.store(p_ptrs, p)
        tl.store(m_ptrs, m)
        tl.store(v_ptrs, v)
        if COPY:
            tl.store(c_ptrs, p.to(g_like_ptr.dtype.element_ty))
    else:
        tl.store(p_ptrs, p, mask=mask)
        tl.store(m_ptrs, m, mask=mask)
        tl.store(v_ptrs, v, mask=mask)
        if COPY:
            tl.store(c_ptrs, p.to(g_like_ptr.dtype.element_ty), mask=mask)

    # All programs of a parameter read its counter, and one of them has to advance it afterwards.
    # Each program takes a ticket after it has read. The program with the last ticket writes t.
    if ticket_ptr is not None:
        tl.debug_barrier()  # All threads of this program have read the counter.
        if tl.atomic_add(ticket_ptr + parameter, 1) == tl.load(plan_ptr + 3) - 1:
            tl.store(t_ptr, t)  # All other programs have read the counter too.
            tl.store(ticket_ptr + parameter, 0)  # Reset the tickets for the next step.


def _plan_of(sizes: tuple[int, ...], block: int) -> torch.Tensor:
    """Return a row for each program: (parameter, chunk, elements left, chunks of the parameter).

    `left` counts the elements of the parameter from the beginning of this chunk on.
    """
    numel = torch.tensor(sizes)
    chunks = -(-numel // block)
    parameter = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    chunk = torch.arange(len(parameter)) - (chunks.cumsum(0) - chunks)[parameter]
    left = numel[parameter] - chunk * block
    return torch.stack([parameter, chunk, left, chunks[parameter]], dim=1)


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> torch.Tensor:
    """Return the plan on `device`. It is kept for the next step on the same stream."""
    return _plan_of(sizes, block).to(device)


# A CUDA graph records launches once (the capture) and replays them, with the same arguments and
# without Python. So what changes from step to step must lie on the GPU. The learning rate, if it
# changes, is a tensor. AdamW's t is a counter for each parameter (`capturable`).
#
# During a capture, this list has the tables that the graph refers to. Each comes with the values
# that it gets when the capture is over, or with None if it has its values already.
_captured: list[tuple[torch.Tensor, torch.Tensor | None]] | None = None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _beside_the_capture(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which work is done at once and memory does not belong to the graph.

    It switches to the default stream, which is never captured.
    """
    return torch.cuda.stream(torch.cuda.default_stream(device))


def _filled_later(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return an empty table for the captured step. `capture` fills it when the capture is over."""
    if _captured is None:
        raise RuntimeError(
            "an optimizer's step is captured within tilelab.kernels.optim.capture, which takes the "
            "arguments of torch.cuda.graph: it fills in the gradients' addresses afterwards"
        )
    with _beside_the_capture(device):
        table = torch.empty_like(values, device=device)
    _captured.append((table, values))
    return table


@contextlib.contextmanager
def capture(graph: "torch.cuda.CUDAGraph", **options: Any) -> Iterator[None]:
    """Capture steps of these optimizers: use it in the place of `torch.cuda.graph`.

    As with torch's optimizers, first take at least one step outside, on the stream of the capture:
    it compiles the kernels and makes the state. AdamW must be `capturable`. A learning rate that is
    a number becomes part of the graph; every replay reads one that is a tensor on the GPU.

    How it works. In a capture the gradients get new addresses, so a step needs a new table. A copy
    from the host would become part of the graph. So a table only gets its memory in the capture.
    It is filled in afterwards. That memory is not from the graph's own pool. There, a table could
    lie where an activation was freed before, and every replay writes that activation first.

    Args:
        graph: the graph to capture into. It keeps the tables, as `graph.optimizer_tables`.
        options: what else `torch.cuda.graph` takes.
    """
    global _captured
    before, _captured = _captured, []
    try:
        with torch.cuda.graph(graph, **options):
            yield
        for table, values in _captured:
            if values is not None:
                with _beside_the_capture(table.device):
                    table.copy_(values)  # The host waits for this copy.
        graph.optimizer_tables = [table for table, _ in _captured]  # They live as long as it.
    finally:
        _captured = before


def _update(kernel: Any, rows: list[tuple[torch.Tensor, ...]], *scalars: Any, **flags: bool):
    """Launch `kernel` once for all rows. A row is a parameter, its gradient, copy and state.

    If there is no copy or no state, the parameter itself takes its place.
    """
    sizes = tuple(row[0].numel() for row in rows)
    first, grad, copy, *_ = rows[0]
    tensors = [t for row in rows for t in row]
    typical = min(max(sizes), 4 * sum(sizes) // len(sizes))  # If most are small, so are chunks.
    name = kernel.__name__.removesuffix("_kernel")
    tile = choose_tile(name, first, DEFAULT, M=max(LEAST, typical))
    aligned = all(t.data_ptr() % 16 == 0 for row in rows for t in row[:5])  # not the counter
    addresses: Any = tensors
    if _capturing(first.device):
        plan = _filled_later(_plan_of(sizes, tile["BLOCK_M"]), first.device)
        addresses = _filled_later(torch.tensor([t.data_ptr() for t in tensors]), first.device)
    else:
        plan = _plan(sizes, tile["BLOCK_M"], first.device, stream_of(first.device))
    launch(
        kernel, (len(plan),), first, grad, addresses, plan, *scalars, **flags,
        COPY=copy is not first, ALIGNED=aligned, **tile,
    )  # fmt: skip
    changed = [t for row in rows for t in (row[0], row[2])]
    torch.autograd.graph.increment_version(changed)  # Tell autograd that they have changed.


def _check_parameter(p: torch.Tensor) -> None:
    check_tensors(params=p)
    if p.is_contiguous():
        return
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride != expected:
            raise ValueError(
                "params must fill their memory without gaps or overlaps, got one of shape "
                f"{list(p.shape)} with strides {list(p.stride())}"
            )
        expected *= size


def _beside(name: str, t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return `t` in the memory layout of `p`: `t` itself if it has that layout, else a copy.

    The kernels walk along the memory of a parameter, its gradient and its state at once.
    """
    if (t.dtype, t.device, t.layout, t.shape) != (p.dtype, p.device, p.layout, p.shape):
        check_tensors(params=p, **{name: t})
        raise ValueError(
            f"{name} must have the shape of its parameter, {list(p.shape)}, got {list(t.shape)}"
        )
    return t if t.stride() == p.stride() else torch.empty_like(p).copy_(t)


def _check_group(group: dict[str, Any]) -> None:
    for p in group["params"]:
        _check_parameter(p)
    for name in ("lr", "momentum", "dampening", "weight_decay", "eps"):
        value = group.get(name, 0.0)
        if not isinstance(value, numbers.Real | torch.Tensor):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    betas = group.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if group.get("nesterov") and not (group["momentum"] > 0 and group["dampening"] == 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, "
            f"got momentum={group['momentum']!r} and dampening={group['dampening']!r}"
        )


class _Optimizer(torch.optim.Optimizer):
    """The common part: it checks, and it gathers the parameters that share a launch.

    Attributes:
        copies: a dict from each parameter that `make_copies` has copied to its copy.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("copies", {})  # A copied or unpickled optimizer has none.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def make_copies(self, dtype: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """Copy all parameters to `dtype`, and keep the copies up to date from now on.

        A step then takes the gradient of the copy instead of the parameter's. It writes the updated
        parameter, rounded, to the copy. So a network can compute with the copies
        (`torch.func.functional_call`), and nothing is cast. The copies are not in the state_dict:
        make them again after parameters have been loaded.

        Args:
            dtype: float16, bfloat16 or float32.

        Returns:
            A dict from each parameter to its copy, which requires a gradient. It is `copies`, too.

        Raises:
            TypeError: the dtype is not supported.
            ValueError: a parameter has strides that its copy cannot have.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        copies = {p: p.to(dtype, copy=True) for p in params}
        for p, copy in copies.items():
            check_tensors(copy=copy)
            if copy.stride() != p.stride():
                raise ValueError(f"params of strides {list(p.stride())} cannot be copied")
            copy.requires_grad_()
        self.copies = copies
        return copies

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the parameters and of their copies."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            if set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.zero_()

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient. Return what `closure` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            sources = {p: self.copies.get(p, p) for p in group["params"]}
            params = [p for p in group["params"] if sources[p].grad is not None]
            for p in params:
                _check_parameter(p)
            grads = [_beside("grad", sources[p].grad, sources[p]) for p in params]
            batches: dict[tuple, list] = {}
            for p, grad in zip(params, grads, strict=True):
                if _capturing(p.device) and not self._is_capturable(group, p):
                    raise RuntimeError(
                        "a step can be captured in a CUDA graph once a step has been taken outside "
                        "of it, which makes the state; AdamW's with capturable=True"
                    )
                scalar, state = self._state(group, p)
                row = p, grad, sources[p], *state
                batches.setdefault((p.dtype, grad.dtype, p.device, scalar), []).append(row)
            for (*_, scalar), rows in batches.items():
                self._launch(group, scalar, rows)
        return loss


def _rate(group: dict[str, Any], p: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Return the learning rate: as a number, or as a tensor that the kernel reads."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device == p.device:
        return 0.0, lr
    return float(lr), None


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum. A step is one launch per group and dtype.

    It takes the place of torch.optim.SGD: its steps are the same up to rounding, and either class
    can load the state_dict of the other. With dampening, parameters in their first step get a
    launch of their own. All steps but the first can be captured in a CUDA graph, see `capture`.

    Args:
        params: tensors or groups of them, as in torch.optim; float32, float16 or bfloat16, in any
            layout without gaps. A gradient or a state in another layout than its parameter is
            copied first.
        lr: the learning rate, a number or a tensor of one element. If the tensor is on the
            parameters' device, the kernel reads it and the host does not.
        momentum: the part of m that is kept in a step; 0 for no momentum.
        dampening: the part of the gradient that does not enter m.
        weight_decay: this times the parameter is added to the gradient.
        nesterov: look ahead by one step of the momentum.
        maximize: go up instead of down.

    Raises:
        TypeError: a dtype or device is not supported, or differs between a parameter and its
            gradient; or a gradient is sparse.
        ValueError: a parameter has gaps, or a number is out of range.

    Source: torch.optim.SGD.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> p.grad = torch.tensor([1.0, -1.0])
        >>> SGD([p], lr=0.5).step()
        >>> p.data
        tensor([0.5000, 2.5000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _is_capturable(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        return group["momentum"] == 0 or self.state[p].get("momentum_buffer") is not None

    def _state(self, group: dict[str, Any], p: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        if group["momentum"] == 0:
            return 1.0, [p]
        state, keep = self.state[p], 1.0 - group["dampening"]
        if state.get("momentum_buffer") is None:  # The first m is momentum * 0 + 1 * g.
            state["momentum_buffer"], keep = torch.zeros_like(p), 1.0
        state["momentum_buffer"] = _beside("momentum_buffer", state["momentum_buffer"], p)
        return keep, [state["momentum_buffer"]]

    def _launch(self, group: dict[str, Any], keep: float, rows: list) -> None:
        _update(
            sgd_kernel, rows, *_rate(group, rows[0][0]), float(group["momentum"]), keep,
            float(group["weight_decay"]), -1.0 if group["maximize"] else 1.0,
            MOMENTUM=group["momentum"] != 0, NESTEROV=group["nesterov"],
        )  # fmt: skip


class AdamW(_Optimizer):
    """Adam with decoupled weight decay. A step is one launch per group and dtype.

    It takes the place of torch.optim.AdamW: its steps are the same up to rounding, and either class
    can load the state_dict of the other. Parameters that have taken different numbers of steps need
    a launch for each number, unless the steps are counted on the GPU (`capturable`).

    Args:
        params: as for SGD.
        lr: as for SGD.
        betas: the parts of m (the mean gradient) and v (the mean squared gradient) that are kept
            in a step.
        eps: is added to sqrt(v'), so that nothing is divided by zero.
        weight_decay: lr * weight_decay is the part of a parameter that a step takes away.
        maximize: go up instead of down.
        capturable: count the steps on the parameters' device. A step can then be captured in a CUDA
            graph, see `capture`.

    Raises:
        TypeError: as for SGD.
        ValueError: as for SGD, or a loaded state_dict has amsgrad.

    Source: torch.optim.AdamW.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> p.grad = torch.tensor([3.0, -3.0])
        >>> AdamW([p], lr=0.5, weight_decay=0).step()
        >>> p.data
        tensor([0.5000, 2.5000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
            capturable=capturable,
        )  # fmt: skip
        self._tickets: dict[torch.device, torch.Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if any(group.get("amsgrad") for group in state["param_groups"]):
            raise ValueError("amsgrad is not supported, got a state_dict that has amsgrad=True")
        super().__setstate__(state)
        self.__dict__.setdefault("_tickets", {})
        for group in self.param_groups:
            group.setdefault("capturable", False)
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    self.state[p]["step"] = self._counter(group, p, self.state[p]["step"])

    def _counter(self, group: dict[str, Any], p: torch.Tensor, steps: Any) -> torch.Tensor:
        """Return the step counter of a parameter. It is on the host unless the GPU counts."""
        device = p.device if group["capturable"] else "cpu"
        return torch.as_tensor(steps, dtype=torch.float32, device=device)

    def _is_capturable(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        return bool(group["capturable"] and self.state[p]) and p.device in self._tickets

    def _state(
        self, group: dict[str, Any], p: torch.Tensor
    ) -> tuple[float | None, list[torch.Tensor]]:
        state = self.state[p]
        if not state:
            state["step"] = self._counter(group, p, 0.0)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _beside(name, state[name], p)
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        if group["capturable"]:
            return None, [*moments, state["step"]]
        state["step"] += 1
        return state["step"].item(), [*moments, p]

    def _ticket(self, group: dict[str, Any], rows: list) -> torch.Tensor | None:
        """Return at least one zero for each row. The kernel leaves them zero."""
        if not group["capturable"]:
            return None
        device, count = rows[0][0].device, len(group["params"])  # A capture may need all.
        if len(self._tickets.get(device, ())) < count:
            self._tickets[device] = torch.zeros(count, dtype=torch.int32, device=device)
        if _captured is not None:
            _captured.append((self._tickets[device], None))
        return self._tickets[device]

    def _launch(self, group: dict[str, Any], step: float | None, rows: list) -> None:
        beta1, beta2 = map(float, group["betas"])
        logs = (math.log(beta or 1e-300) for beta in (beta1, beta2))
        _update(
            adamw_kernel, rows, self._ticket(group, rows), *_rate(group, rows[0][0]), step or 0.0,
            *logs, beta1, 1 - beta1, beta2, 1 - beta2, float(group["eps"]),
            float(group["weight_decay"]), -1.0 if group["maximize"] else 1.0,
        )  # fmt: skip

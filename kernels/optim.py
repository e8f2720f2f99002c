"""SGD and AdamW: one launch for all parameters of a network.

    SGD      g = grad + weight_decay * p                     (-grad with maximize, in AdamW too)
             m = momentum * m + (1 - dampening) * g          (m = g in the first step)
             p = p - lr * (g + momentum * m  if nesterov,  m  with momentum,  else g)

    AdamW    m = beta1 * m + (1 - beta1) * grad              step t = 1, 2, ...
             v = beta2 * v + (1 - beta2) * grad^2
             p = (1 - lr * weight_decay) * p  -  lr * m' / (sqrt(v') + eps)
             with m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t), which undo the start from zero

Every element is on its own, so the arithmetic is a few lines. What matters is the launch: a network
has some hundred parameter tensors, most of them small, and a kernel for each would spend more time
being launched than running. So one launch gets all of them. A kernel cannot take a list of tensors,
but it can take a table of their addresses, and a second table that says which piece is whose:

    parameters    p0 [==========|==========|====]     p1 [===]     p2 [==========|=======]
    programs             0          1        2             3             4           5
    plan             (0, 0)     (0, 1)     (0, 2)        (1, 0)       (2, 0)      (2, 1)
                     parameter 0, its chunk 1, and how many elements are left from there on

One program owns one chunk of BLOCK_M elements of a parameter, its gradient and its state: it looks
up its row of the plan, then their addresses, and from there on it is an ordinary kernel. Both
tables stay on the GPU for as long as shapes and addresses stay what they are.

What limits it: memory. AdamW reads p, grad, m, v and writes p, m, v: 7e bytes an element of e bytes
for some 15 FLOPs. SGD moves 3e bytes, with momentum 5e. With a torch call for each operation, AdamW
would move about 20e. Loads have to be 16 bytes wide for that, and two things stand in the way. The
compiler cannot see that an address out of a table is a multiple of 16: the host looks, and the
kernel says so (`tl.multiple_of`). And a mask that may end anywhere splits a wide load into narrow
ones: so a full chunk is loaded without a mask.

Mixed precision. A float32 parameter p computes as 16-bit numbers. Under autocast each is cast in
every forward pass, and each gradient back: two small launches a tensor. With `make_copies` nothing
is cast: the network runs on 16-bit copies, the kernel reads the copy's gradient, updates p and the
state in float32, and writes p, rounded, to the copy while it has it in registers. AdamW then moves
2 + 12 bytes in and 12 + 2 out, as many as without copies.

In a CUDA graph a replay runs the same launches with the same arguments, and no line of Python. So
what changes from step to step has to lie on the GPU: the learning rate, if it is to change, in a
tensor, and AdamW's t in a counter for each parameter (`capturable`). All programs of a parameter
read its counter, and it is advanced in the same launch: each program takes a ticket once it has
read, and the one with the last ticket writes t. Gradients of a captured step have addresses that
nobody knows before; `capture` fills the tables in when the capture is over.

    1 - beta^t = 1 - exp(x)  with x = t * log(beta)      float32 rounds exp(x) to a multiple of
               = -x (1 + x/2 (1 + x/3 (1 + ...)))        6e-8: near x = 0 little would be left

The arithmetic is in float32, and rounds once, when p, m and v are stored in the parameter's dtype.

Read first: bias_relu.py. Source: Sutskever et al., On the importance of initialization and momentum
in deep learning (2013); Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019); in the
form of torch.optim.SGD and torch.optim.AdamW; Micikevicius et al., Mixed Precision Training (2018),
for the float32 parameters. The tables are those of Apex's multi_tensor_apply.
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
    """One step in plain torch, for any dtype: the new p and m. m is None before the first."""
    g = grad + weight_decay * p
    if momentum == 0:
        return p - lr * g, m
    m = g if m is None else momentum * m + (1 - dampening) * g
    return p - lr * (g + momentum * m if nesterov else m), m


def adamw_reference(p, grad, m, v, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """Step number t in plain torch, for any dtype: the new p, m and v."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    update = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return (1 - lr * weight_decay) * p - lr * update, m, v


TILES = [
    dict(BLOCK_M=1024, num_warps=4),  # 8 elements a thread, a 16-byte load in 16-bit: the default
    dict(BLOCK_M=512, num_warps=2),  # small parameters: fewer lanes without work
    dict(BLOCK_M=1024, num_warps=2),  # 16 elements a thread: twice the loads in flight
    dict(BLOCK_M=2048, num_warps=4),  # the plan and the addresses are looked up half as often
    dict(BLOCK_M=2048, num_warps=8),  # the same, with as many elements a thread as the default
    dict(BLOCK_M=4096, num_warps=8),  # large parameters: least to look up
]
DEFAULT = {2: TILES[0], 4: TILES[0]}


@triton.jit
def sgd_kernel(
    p_like_ptr, g_like_ptr, address_ptr, plan_ptr, lr, lr_ptr, momentum, keep, weight_decay, sign,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program updates one chunk of one parameter, its momentum, and its copy.

    p_like_ptr and g_like_ptr are there for their types. A row of addresses is p, grad, copy, m.
    lr_ptr has the learning rate where it is not None.
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
    if full:  # without a mask: 16-byte loads
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


@triton.jit
def rest_of_power(log_beta, t):
    """1 - beta^t to the precision of float32, from log(beta) < 0 and t >= 1."""
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
    """One program updates one chunk of one parameter, its moments, and its copy.

    A row of addresses is p, grad, copy, m, v, counter. Where ticket_ptr is not None, t is the
    counter's, plus 1; lr_ptr, p_like_ptr and g_like_ptr as above.
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

    # The same for all elements, and some 70 instructions: little beside the chunk's loads.
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    if ticket_ptr is not None:
        t = tl.load(t_ptr) + 1
    step_size = lr / rest_of_power(log_beta1, t)
    scale_v = 1 / tl.sqrt(rest_of_power(log_beta2, t))

    # 1 - beta comes from the host: made of a float32 0.999, it would be off by a part in 100,000.
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

    if ticket_ptr is not None:
        tl.debug_barrier()  # all threads of this program have read the counter
        if tl.atomic_add(ticket_ptr + parameter, 1) == tl.load(plan_ptr + 3) - 1:
            tl.store(t_ptr, t)  # and so have all other programs
            tl.store(ticket_ptr + parameter, 0)  # for the next step


def _plan_of(sizes: tuple[int, ...], block: int) -> torch.Tensor:
    """For each program its parameter, its chunk of it, the elements from there, all its chunks."""
    numel = torch.tensor(sizes)
    chunks = -(-numel // block)
    parameter = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    chunk = torch.arange(len(parameter)) - (chunks.cumsum(0) - chunks)[parameter]
    left = numel[parameter] - chunk * block
    return torch.stack([parameter, chunk, left, chunks[parameter]], dim=1)


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> torch.Tensor:
    """The plan, kept for the stream that it is made and read on."""
    return _plan_of(sizes, block).to(device)


# Of the capture under way: what its graph refers to, and what that is to be filled with.
_captured: list[tuple[torch.Tensor, torch.Tensor | None]] | None = None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _beside_the_capture(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it memory is not the graph's, and the work is done: no default stream is captured."""
    return torch.cuda.stream(torch.cuda.default_stream(device))


def _filled_later(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table for the step that is being captured, which gets its values when that is over."""
    if _captured is None:
        raise RuntimeError(
            "an optimizer's step is captured within kernels.optim.capture, which takes the "
            "arguments of torch.cuda.graph: it fills in the gradients' addresses afterwards"
        )
    with _beside_the_capture(device):
        table = torch.empty_like(values, device=device)
    _captured.append((table, values))
    return table


@contextlib.contextmanager
def capture(graph: "torch.cuda.CUDAGraph", **options: Any) -> Iterator[None]:
    """`torch.cuda.graph(graph, **options)`, for work with steps of these optimizers in it.

    A launch of theirs reads a table of addresses. In a capture gradients get new memory, so a table
    has to be made, but a copy from the host would be part of the graph. So tables only get memory
    in the capture, which the graph keeps, and are filled in behind it. It is not the graph's own
    memory: there a table would lie where an activation has been freed, which every replay writes
    before the table is read.

    As for torch's optimizers: take a step or more before, on the stream of the capture (kernels
    are compiled, state is made), and let AdamW be `capturable`. A learning rate that is a number is
    part of the graph; one in a tensor on the GPU is read in every replay.
    """
    global _captured
    before, _captured = _captured, []
    try:
        with torch.cuda.graph(graph, **options):
            yield
        for table, values in _captured:
            if values is not None:
                with _beside_the_capture(table.device):
                    table.copy_(values)  # the host waits for it
        graph.optimizer_tables = [table for table, _ in _captured]  # for as long as it lives
    finally:
        _captured = before


def _update(kernel: Any, rows: list[tuple[torch.Tensor, ...]], *scalars: Any, **flags: bool):
    """Launch `kernel` once for all rows, each a parameter, its gradient, its copy and its state.

    Where there is no copy, or no state, the parameter itself takes its place.
    """
    sizes = tuple(row[0].numel() for row in rows)
    first, grad, copy, *_ = rows[0]
    tensors = [t for row in rows for t in row]
    typical = min(max(sizes), 4 * sum(sizes) // len(sizes))  # where most are small, smaller chunks
    tile = choose_tile(kernel.__name__.removesuffix("_kernel"), first.dtype, DEFAULT, M=typical)
    aligned = all(t.data_ptr() % 16 == 0 for row in rows for t in row[:5])  # not a counter
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
    torch.autograd.graph.increment_version(changed)  # autograd cannot see it


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
    """`t`, laid out in memory as `p`: itself where it is, else a copy.

    The kernels walk along the memory of all tensors of a parameter at once.
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
    """What both do: check, and gather the parameters that one launch can update together.

    Attributes:
        copies: of each parameter that `make_copies` has copied, its copy.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("copies", {})  # a copied or unpickled optimizer has none

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def make_copies(self, dtype: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """Copy all parameters to `dtype`, and from now on work for the copies.

        A step takes the gradient of a copy where it took the parameter's, and writes the updated
        parameter, rounded, to its copy. So a network can compute with the copies
        (`torch.func.functional_call`), and nothing is cast. They are no part of the state_dict:
        make them again after parameters have been loaded.

        Returns:
            Of each parameter its copy, which requires a gradient; `copies` has them too.
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
        """Forget the gradients, those of the copies too."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            if set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.zero_()

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; return what `closure` returned, if given."""
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
    """The learning rate: a number, or a tensor that the kernel reads."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device == p.device:
        return 0.0, lr
    return float(lr), None


class SGD(_Optimizer):
    """Stochastic gradient descent, with momentum; a step is one launch a group and dtype.

    Takes the place of torch.optim.SGD: the same steps to rounding, and a state_dict goes both ways.
    With dampening, parameters in their first step get a launch of their own. Its later steps can be
    captured in a CUDA graph, see `capture`.

    Args:
        params: tensors or groups of them, as in torch.optim; float32, float16 or bfloat16, of any
            layout without gaps. A gradient or a state that lies differently in memory is copied to
            lie as its parameter does.
        lr: the learning rate: a number, or a tensor of one element. On the parameters' device the
            host does not read it.
        momentum: 0 for none.
        dampening: of what enters the momentum.
        weight_decay: added to the gradient, times the parameter.
        nesterov: look ahead by one step of the momentum.
        maximize: go up instead of down.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between a parameter and its
            gradient; a sparse gradient.
        ValueError: a parameter with gaps, or a number out of range.

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
        if state.get("momentum_buffer") is None:  # momentum * 0 + 1 * g: the first step's m = g
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
    """Adam with decoupled weight decay; a step is one launch a group and dtype.

    Takes the place of torch.optim.AdamW: the same steps to rounding, and a state_dict goes both
    ways. Parameters that have taken a different number of steps get a launch of their own, unless
    the steps are counted on the GPU.

    Args:
        params: as for SGD.
        lr: as for SGD.
        betas: how much of the mean of the gradients, and of their squares, is kept in a step.
        eps: added to the root of the mean square, so that nothing is divided by zero.
        weight_decay: how much of lr times the parameter is taken from it in a step.
        maximize: go up instead of down.
        capturable: count the steps on the parameters' device, so that a step can be captured in a
            CUDA graph, see `capture`.

    Raises:
        TypeError: as for SGD.
        ValueError: as for SGD; a loaded state_dict with amsgrad.

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
        """The steps of a parameter, on the host unless the GPU counts."""
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
        """A zero for each row, or more. The kernel leaves them zero."""
        if not group["capturable"]:
            return None
        device, count = rows[0][0].device, len(group["params"])  # all, or a capture may need more
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

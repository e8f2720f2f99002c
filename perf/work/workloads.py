"""What is measured: each operator in each mode, by our kernels and its peers, on the same inputs.

A workload is an operator, a mode, a dtype and a shape. Everything else follows from it:

    inputs      random in [-1, 1] (zeros would make a GPU faster than it is), or empty ones that are
                only compiled for
    call        a function of no arguments that does the work once, and returns its results
    reference   the peer's formula in float64

These are the modes:

    fwd              forward
    dgrad, wgrad     the gradients of the first and of the second factor of a product
    bwd              all gradients at once
    fwdbwd           forward and gradient, where the gradient is made on the way forward
    step             an optimizer's step, or the forward and backward pass of a whole network

A gradient is asked for through autograd, from ours and from the peers alike. Only the inputs that
the mode is about require a gradient, and the forward pass is over before the clock starts.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tilelab.perf.errors import PerfError
from tilelab.perf.work.formulas import Maker
from tilelab.perf.work.operators import OPERATORS, Mode, Operator, import_what_rows_call
from tilelab.perf.work.peers import PEERS, as_peer

import_what_rows_call()

DTYPES = {  # as users type them: dtype and how float32 products are rounded
    "bf16": ("bfloat16", "ieee"),
    "fp16": ("float16", "ieee"),
    "fp32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "fp8": ("float8_e4m3fn", "ieee"),
    "int8": ("int8", "ieee"),
}


class Workload(NamedTuple):
    """One thing to measure. `shape` has the sizes of the operator's row."""

    op: str
    mode: str
    dtype: str
    precision: str
    shape: dict[str, int]
    name: str

    @property
    def operator(self) -> Operator:
        """The operator's row in the table."""
        return OPERATORS[self.op]

    @property
    def about(self) -> Mode:
        """What the row says of the mode."""
        return self.operator.modes[self.mode]

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    @property
    def flops(self) -> int:
        """FLOPs that the mathematics asks for."""
        return self.about.flops(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that must be read and written at least."""
        return self.about.bytes(self.shape, self.torch_dtype.itemsize)


GRADIENTS = ("dgrad", "wgrad", "bwd", "fwdbwd")


def modes(op: str, text: str) -> list[str]:
    """The modes of `op` that `text` names: "fwd,dgrad", "bwd" (every gradient) or "all".

    A mode that only other operators have is left out. What has `step` alone does that, whatever is
    asked for.
    """
    if op not in OPERATORS:
        raise PerfError(f"unknown operator {op!r}: there are {', '.join(OPERATORS)}")
    has = OPERATORS[op].modes
    chosen = []
    for mode in text.split(","):
        if mode not in ("all", "fwd", "step", *GRADIENTS):
            raise PerfError(
                f"unknown mode {mode!r}: fwd, dgrad, wgrad, bwd (all gradients), step or all"
            )
        wanted = has if mode == "all" or has.keys() == {"step"} else (mode,)
        if mode == "bwd":
            wanted = GRADIENTS
        chosen += [m for m in has if m in wanted and m not in chosen]
    return chosen


def offers(peer: str, w: Workload) -> bool:
    """Whether a peer has something of its own for this work."""
    return peer in w.operator.peers(w)


def prepare(w: Workload, impl: str, device: str, seed: int | None) -> Callable[[], tuple]:
    """Make inputs, and return the function that does the work once on them for its results.

    Its attribute `inputs` has the tensors that it must not change.

    Args:
        w: what to do.
        impl: "tilelab", a peer (see PEERS), or "reference": the peer's formula in float64.
        device: where.
        seed: of the inputs; the same seed gives every implementation the same values. With None
            they are left empty.
    """
    if impl in PEERS and not offers(impl, w):
        raise PerfError(f"{impl} has nothing for {w.op} {w.mode}")
    do = w.operator.prepare or _function
    call, call.inputs = do(w, impl, device, Maker(w.torch_dtype, device, seed))
    return call


def _function(w, impl, device, make):
    inputs = w.operator.inputs(w.shape, make)
    if impl == "reference":
        inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    wrt = [inputs[name].requires_grad_() for name in w.about.wrt]
    formula = w.operator.ours if impl == "tilelab" else w.operator.theirs

    def forward(*tensors):
        return formula(w.shape, *tensors)

    forward = as_peer(impl, forward)
    tensors = list(inputs.values())
    if w.mode == "fwd":

        def call():
            with torch.no_grad():
                return (forward(*tensors),)

    elif w.mode == "fwdbwd":

        def call():
            y = forward(*tensors)
            return y.detach(), *torch.autograd.grad(y, wrt)

    else:
        y = forward(*tensors)
        dy = make(*y.shape).to(y.dtype)  # after the inputs: the same for every implementation
        tensors.append(dy)

        def call():
            return torch.autograd.grad(y, wrt, dy, retain_graph=True)

    return call, tensors


@contextlib.contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Within this context cuDNN tries its algorithms (the first time), or takes its own guess."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def set_precision(precision: str) -> None:
    """Set how float32 products and convolutions round, ours and torch's: "ieee" or "tf32"."""
    # The older flags, since they set the newer ones too. The other way round Inductor, which reads
    # the older ones, gets an error: that the two contradict each other.
    with warnings.catch_warnings():  # that they are old
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def tolerance(w: Workload, results: int, impl: str = "tilelab") -> float:
    """The largest acceptable relative error in the 2-norm, ||got - reference|| / ||reference||.

    A rounding to the dtype, the sum of `terms` products in float32 (of float8: in 14 bits, as on
    Hopper), and TF32 where it is on, as tests/tools/tolerance.py derives them; twice that, since
    gradients round twice. Peers have four times as much: cuBLAS may add partial sums in 16 bits,
    and cuDNN transform (Winograd). Where a maximum decides which way a gradient goes, float32
    decides differently from float64 in about one window of a million; one way in a million is 1e-3
    of the norm. Of TF32 products it is one window in a thousand, and one in a hundred of 16-bit
    activations, as in a training step and in peers, which round a convolution's result before they
    pool it: there the gate only keeps out what is plainly wrong. Through a stack of convolutions
    the ways that differ multiply; what has nothing to do with the reference is at 1 and beyond.
    """
    terms = max(1, w.flops // (2 * max(results, 1)))
    rounded = torch.finfo(getattr(torch, w.operator.result or w.dtype))
    bound = rounded.eps / 2 + 2 * torch.finfo(torch.float32).eps * math.sqrt(terms)
    if w.dtype == "float8_e4m3fn":
        bound += 2 * 2.0**-13 * math.sqrt(terms)
    if w.precision == "tf32":
        bound += 2 * 2.0**-10
    misrouted = w.about.misrouted
    several = w.operator.layers > 1 or impl != "tilelab"  # what is rounded between is pooled
    if misrouted and ((w.dtype != "float32" and several) or w.precision == "tf32"):
        return misrouted
    bound *= w.operator.layers
    return (2 if impl == "tilelab" else 8) * bound + (5e-3 if misrouted else 0.0)

"""Activations, each with its gradient: the one place that knows them.

A kernel calls `activate` where its result is still in registers, as the last thing before the
store: there an activation costs instructions and no bytes. The name is a constant of the compiled
kernel, so a kernel has the instructions of its own activation alone.

    relu        y = max(z, 0)                         dz = dy where z > 0, else 0
    gelu        y = z P,  P = (1 + erf(z/sqrt(2)))/2  dz = dy (P + z exp(-z^2/2)/sqrt(2 pi))
    gelu_tanh   y = z s,  s = sigmoid(2u),            dz = dy (s + z s (1 - s) 2u')
                          u = sqrt(2/pi) (z + a z^3)
    silu        y = z s,  s = sigmoid(z)              dz = dy (s + z s (1 - s))

(GELU's other form is written with tanh, of which (1 + tanh(u)) / 2 is sigmoid(2u); a = 0.044715.)

What a gradient needs. z > 0 says the same as y > 0, so ReLU needs its output alone, which the next
layer keeps anyway. The others need z. For one element of the result, of e bytes, forward and
backward move:

    ReLU                                      y out; dy and y in, dz out             4e
    z stored by the epilogue beside y         y, z out; dy and z in, dz out          5e
    z by another product in the backward      y out; z out; dy and z in, dz out      5e, 2K FLOPs
    z by the product, y by a pass of its own  z out; z in, y out; dy, z in, dz out   6e

The first way to keep z moves the least, and its kernel spills: a 128x256 tile by TMA that stores z
as well lacks 176 to 288 bytes of registers a thread. The second has no z to keep. An H200 does 206
FLOPs in 16-bit in the time of a byte, so it is faster than the third for a sum of K < 206 products,
and slower for longer ones. Taken is the third (`needs_z` says when): it has no kernel of its own,
and dz comes with the gradient of the bias in one pass (bias_relu.py). Without gradients everything
is fused, and only y is written.

A new activation is a line in ACTIVATIONS and a branch in `activate`.

Infinities: z = -inf gives NaN but for ReLU, as in torch, and so do gradients at either infinity.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import check_choice


class Activation(NamedTuple):
    """What the host has to know of one.

    Attributes:
        formula: the same in plain torch.
        of_output: whether `activate` gives its gradient from y as well as from z.
    """

    formula: Callable[[torch.Tensor], torch.Tensor]
    of_output: bool = False


def _gelu_tanh(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


ACTIVATIONS = {
    "relu": Activation(torch.relu, of_output=True),
    "gelu": Activation(torch.nn.functional.gelu),
    "gelu_tanh": Activation(_gelu_tanh),
    "silu": Activation(torch.nn.functional.silu),
}


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, dy=None):
    """act(z) of a float32 tile; of dy, if it is given, the gradient with respect to z: dz."""
    if ACTIVATION == "relu":
        if dy is None:
            out = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # one instruction
        else:
            out = tl.where(z <= 0, 0.0, dy)  # z or y: both say which
    elif ACTIVATION == "gelu":
        # P to 7.5e-8, by Abramowitz and Stegun's 26.2.17. Its density is that of the gradient, and
        # the library's erf needs more registers than the largest tiles have left.
        t = 1 / (1 + 0.2316419 * tl.abs(z))
        poly = 1.781477937 + t * (-1.821255978 + t * 1.330274429)
        poly = t * (0.319381530 + t * (-0.356563782 + t * poly))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        tail = poly * density
        if dy is None:
            out = 0.5 * z + tl.abs(z) * (0.5 - tail)  # z * P, without a choice
        else:
            out = dy * (tl.where(z < 0, tail, 1 - tail) + z * density)
    elif ACTIVATION == "gelu_tanh":
        u2 = z * (1.5957691216057308 + 0.07135481282636164 * z * z)  # 2u
        s = tl.sigmoid(u2)  # 1 / (1 + exp(-2u)): an overflow gives 0, as it should
        if dy is None:
            out = z * s
        else:
            slope = 1.5957691216057308 + 0.21406443847908493 * z * z  # of 2u
            out = dy * (s + z * (s * (1 - s) * slope))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        if dy is None:
            out = z * s
        else:
            out = dy * (s + z * (s * (1 - s)))
    else:
        tl.static_assert(ACTIVATION is None, "an activation without a branch here")
        out = z if dy is None else dy
    return out


def activated(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """`act(z)` in plain torch, for any dtype: the references' last line."""
    return z if activation is None else ACTIVATIONS[activation].formula(z)


def check_activation(activation: str | None) -> str | None:
    """Raise ValueError for what is neither None nor the name of an activation; return it."""
    check_choice("activation", activation, (None, *ACTIVATIONS))
    return activation


def kept_for(activation: str | None, output: torch.Tensor) -> torch.Tensor | None:
    """What an operator with a fused activation keeps for its gradient: the output, or nothing."""
    if activation is None:
        return None
    if not ACTIVATIONS[activation].of_output:
        raise RuntimeError(f"{activation} has no gradient where it is fused: see `needs_z`")
    return output


def needs_z(activation: str | None, *inputs: torch.Tensor | None) -> bool:
    """Whether a call has to keep z: one of its inputs wants a gradient that is not of y."""
    if activation is None or ACTIVATIONS[activation].of_output or not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in inputs)

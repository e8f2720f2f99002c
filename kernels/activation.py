"""Activations, each with its gradient, for all kernels that end with one.

A kernel calls `activate` as the last thing before it stores its result. There the result is still
in registers, so an activation costs instructions and no bytes. `z` is the result before it:

    relu        y = max(z, 0)                         dz = dy where z > 0, else 0
    gelu        y = z P,  P = (1 + erf(z/sqrt(2)))/2  dz = dy (P + z exp(-z^2/2)/sqrt(2 pi))
    gelu_tanh   y = z s,  s = sigmoid(2u),            dz = dy (s + z s (1 - s) 2u')
                          u = sqrt(2/pi) (z + a z^3)
    silu        y = z s,  s = sigmoid(z)              dz = dy (s + z s (1 - s))

In gelu_tanh, a is 0.044715. This GELU is usually written with (1 + tanh(u)) / 2, which is equal to
sigmoid(2u).

The name of the activation is a constant of the compiled kernel. So a kernel contains the
instructions of its own activation, and of no other.

What a gradient needs. y > 0 says the same as z > 0, so ReLU's gradient needs only the output y,
which the next layer keeps anyway. The other gradients need z. `needs_z` at the end of this file
says how an operator gets it, and counts the bytes. A call without gradients fuses every activation,
and writes only y.

NaN and infinities are as in torch. NaN gives NaN. z = -inf gives NaN, except with ReLU. The
gradients at both infinities are NaN, except with ReLU.

A new activation is one line in ACTIVATIONS and one branch in `activate`. README.md in this folder
has the recipe.

Read first: bias_relu.py. Sources: torch.nn.functional's relu, gelu and silu; Hendrycks and Gimpel,
Gaussian Error Linear Units (2016).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tilelab.kernels._checks import check_choice


class Activation(NamedTuple):
    """What the host code knows about one activation.

    Attributes:
        formula: the activation in plain torch.
        of_output: True if `activate` gives the same gradient for y as for z.
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
    """Return act(z) of a float32 tile z. If dy is given, return dz, the gradient of z, instead."""
    if ACTIVATION == "relu":
        if dy is None:
            out = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN stays NaN
        else:
            out = tl.where(z <= 0, 0.0, dy)  # z may also be y
    elif ACTIVATION == "gelu":
        # This is formula 26.2.17 of Abramowitz and Stegun. It gives P with an error below 7.5e-8,
        # and the gradient uses its density too. The library's erf needs more registers than the
        # largest tiles have left. tail is 1 - P for z >= 0, and P for z < 0.
        t = 1 / (1 + 0.2316419 * tl.abs(z))
        poly = 1.781477937 + t * (-1.821255978 + t * 1.330274429)
        poly = t * (0.319381530 + t * (-0.356563782 + t * poly))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        tail = poly * density
        if dy is None:
            out = 0.5 * z + tl.abs(z) * (0.5 - tail)  # z * P for both signs of z
        else:
            out = dy * (tl.where(z < 0, tail, 1 - tail) + z * density)
    elif ACTIVATION == "gelu_tanh":
        u2 = z * (1.5957691216057308 + 0.07135481282636164 * z * z)  # 2u
        s = tl.sigmoid(u2)  # 1 / (1 + exp(-2u)): if exp overflows, s is 0, as it should be
        if dy is None:
            out = z * s
        else:
            slope = 1.5957691216057308 + 0.21406443847908493 * z * z  # 2u'
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
    """Return act(z) in plain torch, for any dtype. The references of the lessons end with this."""
    return z if activation is None else ACTIVATIONS[activation].formula(z)


def check_activation(activation: str | None) -> str | None:
    """Return `activation`. Raise ValueError if it is neither None nor the name of one."""
    check_choice("activation", activation, (None, *ACTIVATIONS))
    return activation


def kept_for(activation: str | None, output: torch.Tensor) -> torch.Tensor | None:
    """Return what an operator keeps for its activation's gradient: the output or None."""
    if activation is None:
        return None
    if not ACTIVATIONS[activation].of_output:
        raise RuntimeError(f"{activation} has no gradient where it is fused: see `needs_z`")
    return output


# Four ways to the gradient, where z is a sum of K products. For one element of the result, of e
# bytes, forward and backward together move these bytes ("out" is a write, "in" is a read):
#
#       way                                  forward              backward                 bytes
#    0  ReLU needs only y                    y out                dy, y in; dz out         4e
#    1  the epilogue stores z as well as y   y, z out             dy, z in; dz out         5e
#    2  the backward computes z again        y out                z out; dy, z in; dz out  5e
#    3  y has a pass of its own              z out; z in; y out   dy, z in; dz out         6e
#
# The kernel of way 1 spills. (A spill is a value that does not fit into the registers and goes to
# memory.) In a 128x256 tile that is loaded by TMA, it spills 176 to 288 bytes per thread. Way 2
# costs another 2K FLOPs, and saves e = 2 bytes in 16-bit against way 3. An H200 does 206 FLOPs in
# the time of one byte. So way 2 is faster than way 3 for K < 206, and slower for longer sums.
#
# The operators take way 3. It needs no kernel of its own, and bias_relu.py computes dz and the
# gradient of the bias in one pass.


def needs_z(activation: str | None, *inputs: torch.Tensor | None) -> bool:
    """Return whether a call must keep z: an input requires a gradient that y is not enough for."""
    if activation is None or ACTIVATIONS[activation].of_output or not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in inputs)

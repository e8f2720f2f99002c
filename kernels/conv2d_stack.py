"""A stack of convolutions with ReLUs and pools, whose backward fuses across layers.

    forward     x_{i+1} = relu(conv2d(x_i, w_i) + b_i), in some layers followed by a 2x2 max-pool
    backward    for each layer i, from the last one to the first:

        dz_i     the gradient of z_i, the value before the ReLU of layer i
        db_i     the sum of dz_i over images and pixels
        dw_i     from x_i and dz_i
        dx_i     from dz_i and w_i: the gradient of the output of layer i-1

Autograd goes layer by layer, and no layer knows its neighbours. So each ReLU costs a pass: it reads
dx_i and x_i, writes dz_{i-1} and sums its columns. But x_i = relu(z_{i-1}) is an input of layer i
anyway. So the kernel of dx_i can mask it with x_i and sum its columns before it writes anything.
The kernel of layer i does the first work of layer i-1:

    layer i        dw_i from x_i, dz_i          dx_i from dz_i, w_i
                                                   | mask by x_i > 0, sum the columns
                                                   v
    layer i-1      dw_{i-1} from x_{i-1}, dz_{i-1}   and db_{i-1}

    layer i-1 has no pool       dz_{i-1}, db_{i-1} = conv2d_input_grad_relu(dz_i, w_i, x_i)
    layer i-1 has a pool        dx_i is not masked. The forward kept the place of each maximum, and
                                the place says whether it came through the ReLU. The code in
                                conv2d_relu_pool_grad.py reads it.
    the last layer, no pool     the mask and the sum are a pass of their own

The bytes for an activation x_i of n elements of e bytes, behind a layer without a pool:

    layer by layer    4ne    write dx_i; read dx_i and x_i; write dz_{i-1}
    here              2ne    read x_i; write dz_{i-1}

Both then read dz_{i-1} for the two gradients of layer i-1. The 2ne need an input gradient by TMA
(conv2d_input_grad_tma.py); else the pass stays. Eight of the thirteen convolutions of VGG16 have
another one directly behind them. The FLOPs are those of the convolutions.

Read first: conv2d.py, conv2d_input_grad.py, conv2d_relu_pool_grad.py.
"""

from typing import Any, NamedTuple

import torch

from tilelab.kernels._checks import autocast
from tilelab.kernels._geometry import check_conv2d
from tilelab.kernels.bias_relu import bias_activation_backward
from tilelab.kernels.conv2d import _conv2d
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad, conv2d_input_grad_relu
from tilelab.kernels.conv2d_relu_pool import _conv2d_relu_pool, check_pooled
from tilelab.kernels.conv2d_relu_pool_grad import conv2d_relu_pool_backward
from tilelab.kernels.conv2d_weight_grad import conv2d_weight_grad


class Layer(NamedTuple):
    """The settings of one layer of a stack, as conv2d takes them.

    Attributes:
        pool: whether a 2x2 max-pool follows the ReLU. Such a layer takes only padding: its stride
            and dilation are 1, and so is its number of groups.
        stride: the distance between windows in pixels.
        padding: the rows and columns of zeros on each side of the image.
        dilation: the distance between the taps of a filter in pixels.
        groups: the number of groups of channels.
    """

    pool: bool = False
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1


def reference(x, *parameters, layers):
    """The same in plain torch, for any dtype."""
    for layer, weight, bias in zip(layers, parameters[::2], parameters[1::2], strict=True):
        x = torch.nn.functional.conv2d(x, weight, bias, *layer[1:]).relu()
        x = torch.nn.functional.max_pool2d(x, 2) if layer.pool else x
    return x


# What is kept. The input x_i of a layer is kept for dw_i and as the mask of dx_i. It is also the
# output of layer i-1, so it is stored once. A pool keeps one more byte per element of its output.
# What no gradient needs is not kept. Below the lowest layer that needs a gradient, the backward
# computes nothing.


class _Stack(torch.autograd.Function):
    """The stack as one operator, of x and then a weight and a bias per layer.

    `needs` says which of these need a gradient: x is number 0, w_i 2i + 1, b_i 2i + 2.
    """

    @staticmethod
    def forward(ctx: Any, layers: tuple[Layer, ...], x: torch.Tensor, *parameters: Any) -> Any:
        needs = ctx.needs_input_grad[1:]
        ctx.layers, ctx.sizes, ctx.geometry = layers, [], []
        inputs, weights, places = [], [], []
        for i, layer in enumerate(layers):
            weight, bias = parameters[2 * i : 2 * i + 2]
            below = any(needs[: 2 * i + 1])  # The backward computes dx_i.
            reached = any(needs[: 2 * i + 3])  # The backward goes down to layer i.
            masks = below and i > 0 and not layers[i - 1].pool
            ctx.sizes.append(list(x.shape))
            inputs.append(x if needs[2 * i + 1] or masks else None)
            weights.append(weight if reached else None)
            place = None
            if layer.pool:
                padding = check_pooled(x, weight, bias, layer.padding)
                geometry = (1, 1), padding, (1, 1)
                x, place = _conv2d_relu_pool(x, weight, bias, padding)
            else:
                geometry = check_conv2d(x, weight, bias, *layer[1:], "relu")
                x = _conv2d(x, weight, bias, *geometry, layer.groups, "relu")
            places.append(place if reached else None)
            ctx.geometry.append(tuple(list(pair) for pair in geometry))
        last = None if layers[-1].pool else x
        ctx.save_for_backward(*inputs, *weights, *places, last)
        return x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        layers, needs, count = ctx.layers, ctx.needs_input_grad[1:], len(ctx.layers)
        *saved, last = ctx.saved_tensors
        inputs, weights, places = saved[:count], saved[count : 2 * count], saved[2 * count :]
        grads: list = [None] * len(needs)
        dbias = None
        if last is not None:
            dy, dbias = bias_activation_backward(dy, last, None, "relu")
        # dy is the gradient of layer i's output if it has a pool, and dz_i if it has none.
        for i in reversed(range(count)):
            below = any(needs[: 2 * i + 1])
            needs_w, needs_b = needs[2 * i + 1 : 2 * i + 3]
            if not (below or needs_w or needs_b):
                break
            masks = below and i > 0 and not layers[i - 1].pool
            x, weight, geometry = inputs[i], weights[i], (*ctx.geometry[i], layers[i].groups)
            dx = dweight = before = None
            if layers[i].pool:
                dx, dweight, dbias, before = conv2d_relu_pool_backward(
                    dy, places[i], x, weight, ctx.sizes[i], geometry[1],
                    [below, needs_w, needs_b], masks,
                )  # fmt: skip
            else:
                if needs_w:
                    dweight = conv2d_weight_grad(x, dy, weight, *geometry)
                if masks:
                    dx, before = conv2d_input_grad_relu(dy, weight, x, *geometry)
                elif below:
                    dx = conv2d_input_grad(dy, weight, ctx.sizes[i], *geometry)
            grads[2 * i + 1 : 2 * i + 3] = dweight if needs_w else None, dbias if needs_b else None
            dy, dbias = dx, before
        grads[0] = dy if needs[0] else None
        return None, *grads


def conv2d_stack(
    x: torch.Tensor, *parameters: torch.Tensor | None, layers: tuple[Layer, ...]
) -> torch.Tensor:
    """Compute convolutions with bias and ReLU one after the other, some with a 2x2 max-pool.

    The result is that of `conv2d(..., activation="relu")` and `conv2d_relu_pool`, one layer after
    the other. Only the backward differs: it saves a pass for each layer without a pool that is
    followed by another layer.

    Args:
        x: [N, C, H, W]; float32, float16 or bfloat16; any strides, fastest in channels_last memory.
        parameters: a weight [K, C/groups, R, S] and a bias [K] or None for each layer, in x's
            dtype: weight, bias, weight, bias and so on.
        layers: the settings of each layer; at least one.

    Returns:
        The last layer's output, in channels_last memory. It is differentiable in x and in all
        parameters.

    Raises:
        TypeError: a dtype or device is not supported, or differs between the tensors.
        ValueError: shapes or geometry do not fit, or there are not two parameters per layer.

    Source: torch.nn.functional.conv2d, relu and max_pool2d.

    Example:
        >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
        >>> conv2d_stack(x, weight, None, weight, None, layers=(Layer(), Layer(pool=True))).item()
        16.0
    """
    if not layers or len(parameters) != 2 * len(layers):
        raise ValueError(
            f"parameters must be a weight and a bias for each of {len(layers)} layers, at least "
            f"one, got {len(parameters)}"
        )
    return _Stack.apply(tuple(layers), *autocast(x, *parameters))

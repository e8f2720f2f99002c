"""A stack of convolutions with ReLUs and pools, and one backward that knows what lies between them.

    forward     x_{i+1} = relu(conv2d(x_i, w_i) + b_i), in some layers with a 2x2 max-pool behind it
    backward    from the gradient of the last x to the first, for each layer

        dz_i     the gradient before the ReLU of layer i
        db_i     the sum of dz_i over images and pixels
        dw_i     from x_i and dz_i
        dx_i     from dz_i and w_i: of the output of layer i-1, if there is one

Layer by layer, autograd calls each layer with the gradient of its output, and no layer knows of the
next one. So a ReLU is a pass of its own: dx is written, read with x, and written again as dz, with
the column sums. But x_i = relu(z) is what layer i has anyway: dx_i can be masked by it before it is
written, and its columns summed there. The input gradient of layer i ends with what layer i-1 would
have begun with:

    a layer without a pool before it    dz_{i-1}, db_{i-1} = conv2d_input_grad_relu(dz_i, w_i, x_i)
    after a pool                        dx_i as it is: the place of a maximum says whether it came
                                        through the ReLU, and conv2d_relu_pool_grad.py looks there
    the last layer                      a pass of its own, if it has no pool

Behind a layer without a pool an activation of n elements of e bytes costs 4ne bytes layer by layer
(dx written, dx and x read, dz written) and 2ne here (x read, dz written), where the input gradient
has a kernel that can; the two gradients that read dz do so either way. Eight of VGG16's thirteen
convolutions are followed so.

What is kept: of a layer its input, which is the output before it; of a pool a byte an output
besides. The input is kept for dw, and to mask; where neither is asked for, it is not, and nothing
is computed for a layer below the lowest that has anything to learn.

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
    """What of a layer of a stack is no tensor, as conv2d takes it.

    Attributes:
        pool: whether a 2x2 max-pool follows the ReLU; then there is padding and nothing else.
        stride: in pixels.
        padding: zeros on each side.
        dilation: distance of the filter's taps.
        groups: of channels.
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


class _Stack(torch.autograd.Function):
    """Layers, x, and a weight and a bias for each; `needs` numbers them: x is 0, w_i is 2i + 1."""

    @staticmethod
    def forward(ctx: Any, layers: tuple[Layer, ...], x: torch.Tensor, *parameters: Any) -> Any:
        needs = ctx.needs_input_grad[1:]
        ctx.layers, ctx.sizes, ctx.geometry = layers, [], []
        inputs, weights, places = [], [], []
        for i, layer in enumerate(layers):
            weight, bias = parameters[2 * i : 2 * i + 2]
            below = any(needs[: 2 * i + 1])  # is a gradient of x_i asked for?
            reached = any(needs[: 2 * i + 3])
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
        for i in reversed(range(count)):  # dy: of layer i's output; without a pool, before its ReLU
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

    The same as `conv2d(..., activation="relu")` and `conv2d_relu_pool` in a row, but for the
    backward, which has a pass less for each layer without a pool that another one follows.

    Args:
        x: [N, C, H, W]; float32, float16 or bfloat16; any strides, fastest in channels_last memory.
        parameters: for each layer its weight [K, C/groups, R, S] and its bias [K] or None, of x's
            dtype.
        layers: what is no tensor of each; at least one.

    Returns:
        The last layer's output, in channels_last memory. Differentiable in x and all parameters.

    Raises:
        TypeError: a dtype or device that is not supported, or differs between the tensors.
        ValueError: shapes or geometry that do not fit, or not two parameters a layer.

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

"""Layers: `torch.nn.Module`s that compute with our kernels instead of PyTorch's.

A layer adds nothing to the mathematics: it holds the parameters and calls kernels. A class with
parameters is a subclass of its torch.nn twin. So both have the same names, shapes and default
initialisation, and use the random generator alike:

    torch.manual_seed(0); ours = Conv2d(3, 16, 3)
    torch.manual_seed(0); theirs = torch.nn.Conv2d(3, 16, 3)      # the same weights, bit for bit
    theirs.load_state_dict(ours.state_dict())                     # and a state_dict goes both ways

These layers add fusion. A separate ReLU reads and writes a whole tensor in a GPU's memory, only for
one comparison per element. Three things avoid such passes:

- `activation="relu"`, or another activation of `matmul`, replaces a second layer of torch.nn.
- `Conv2dReluPool` writes only the largest of each 2 x 2 values: a quarter of the convolution.
- `ConvStack` fuses the operations between such layers in the backward pass.

Images are [N, C, H, W], as everywhere in PyTorch. In memory they are channels_last: the C channels
of a pixel lie side by side. The layers return such images, and read them fastest
(`x.to(memory_format=torch.channels_last)` makes one; contiguous input works too).

Filters are channels_last as well, K rows of R*S*C numbers, from the moment when a layer is made.
The kernels read them in this order, so no call has to pack or transpose them. Loading a state_dict
copies its values into this memory, so they may come in any order.
"""

import itertools

import torch
from torch import Tensor, nn

from tilelab.kernels import (
    bias_relu,
    conv2d,
    conv2d_im2col,
    conv2d_relu_pool,
    conv2d_stack,
    cross_entropy,
    matmul,
    max_pool2d,
    softmax,
)
from tilelab.kernels.activation import check_activation
from tilelab.kernels.conv2d_stack import Layer


class Linear(nn.Linear):
    """`torch.nn.Linear`, with an activation: y = activation(x W^T + b).

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        activation: None or one of `matmul`'s, computed before the result leaves the kernel.

    Shapes: x [..., in_features] to y [..., out_features]; weight [out_features, in_features].
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, activation=None
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = check_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(x W^T + b)."""
        # The kernel reads any strides. So weight.t() is a view, and memory is not transposed.
        y = matmul(x.reshape(-1, x.shape[-1]), self.weight.t(), self.bias, self.activation)
        return y.reshape(*x.shape[:-1], self.out_features)


class FlattenLinear(Linear):
    """`torch.nn.Flatten` and `torch.nn.Linear` in one: it flattens channels_last without a copy.

    Flatten numbers the elements of an image in the order (c, h, w). In channels_last they lie in
    the order (h, w, c), so Flatten copies every image in every call. Here the weights lie in the
    order (h, w, c) too. The sum over an image is the same in any order, if both factors have the
    same order. So images and weights are views: [N, H*W*C] and [out_features, H*W*C]. TMA, the unit
    that copies tiles on Hopper GPUs, can read their rows.

    A tensor of shape [out_features, C*H*W] cannot have the order (h, w, c): one stride cannot
    express it. So the parameter has the shape [out_features, C, H, W], like the filters of a
    convolution, and is channels_last. An optimizer's state for it has four dimensions too.

    A state_dict holds the weight as torch.nn.Linear does: [out_features, C*H*W] in the order
    (c, h, w). This is a copy, and the only one. (With one channel it is a view.)

    The layer is a convolution with one output pixel, but the convolution kernels would be slower.
    They would take one step for each of the H*W taps, with C terms each. Their gradient of x would
    try every tap at every pixel, although only one fits.

    Args:
        in_shape: (C, H, W) of one image.
        out_features, bias, device, dtype, activation: as in Linear.

    Shapes: x [N, C, H, W] to y [N, out_features]; weight [out_features, C, H, W].
    """

    def __init__(
        self, in_shape, out_features, bias=True, device=None, dtype=None, *, activation=None
    ):
        channels, height, width = self.in_shape = tuple(in_shape)
        in_features = channels * height * width
        super().__init__(in_features, out_features, bias, device, dtype, activation=activation)
        self.weight = nn.Parameter(self._as_images(self.weight.detach()))

    def _as_images(self, weight: Tensor) -> Tensor:
        weight = weight.unflatten(1, self.in_shape)
        return weight.contiguous(memory_format=torch.channels_last)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].flatten(1)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        name = prefix + "weight"
        weight = state_dict.get(name)
        if weight is not None and weight.dim() == 2 and weight.shape[1] == self.in_features:
            state_dict = {**state_dict, name: self._as_images(weight)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(x W^T + b) of the flattened x."""
        # Without this check, images of another shape but as many elements would be accepted.
        if x.dim() != 4 or x.shape[1:] != self.in_shape:
            raise ValueError(f"x must be [N, *{list(self.in_shape)}], got {list(x.shape)}")
        rows = x.permute(0, 2, 3, 1).flatten(1)  # This is a view if x is channels_last.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return matmul(rows, weight.t(), self.bias, self.activation)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with zero padding, and an activation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device,
            dtype: as in torch.nn.Conv2d (padding in pixels, not "same" or "valid").
        activation: None or one of `matmul`'s, computed before the result leaves the kernel.
        im2col: compute through an explicit im2col matrix, to compare; it is slower.

    Shapes: x [N, C, H, W] to y [N, K, P, Q]; weight [K, C / groups, R, S].
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        device=None,
        dtype=None,
        *,
        activation=None,
        im2col=False,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.to(memory_format=torch.channels_last)
        self.activation = check_activation(activation)
        self.conv = conv2d_im2col if im2col else conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(conv2d(x, weight) + bias)."""
        return self.conv(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.activation,
        )


class Conv2dReluPool(nn.Conv2d):
    """Convolution (stride 1), bias, ReLU and 2x2 max-pool: one kernel, or more to compare with.

    Args:
        in_channels, out_channels, kernel_size, padding, device, dtype: as in torch.nn.Conv2d.
        how: "fused" is one kernel for all. "separate" is three kernels: the convolution, bias with
            ReLU, and the pool. "im2col" is like "separate", with an explicit im2col matrix.

    Shapes: x [N, C, H, W] to [N, K, P // 2, Q // 2], where [P, Q] is the convolution's output.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        padding=0,
        device=None,
        dtype=None,
        *,
        how="fused",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, padding=padding, device=device, dtype=dtype
        )
        self.to(memory_format=torch.channels_last)
        if how not in ("fused", "separate", "im2col"):
            raise ValueError(f'how must be "fused", "separate" or "im2col", got {how!r}')
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """Return max_pool2d(relu(conv2d(x, weight) + bias))."""
        if self.how == "fused":
            return conv2d_relu_pool(x, self.weight, self.bias, self.padding)
        conv = conv2d if self.how == "separate" else conv2d_im2col
        y = conv(x, self.weight, padding=self.padding)
        return max_pool2d(bias_relu(y, self.bias), 2)


def _stacked(module: nn.Module) -> Layer:
    """Return what `conv2d_stack` needs to know about a layer.

    Raises:
        TypeError: if the layer cannot be part of a stack.
    """
    if isinstance(module, Conv2dReluPool) and module.how == "fused":
        return Layer(pool=True, padding=module.padding)
    if isinstance(module, Conv2d) and module.activation == "relu" and module.conv is conv2d:
        return Layer(False, module.stride, module.padding, module.dilation, module.groups)
    raise TypeError(
        'a stack is of Conv2d(..., activation="relu") and of fused Conv2dReluPool, got '
        f"{type(module).__name__}"
    )


class ConvStack(nn.Sequential):
    """Convolutions with ReLUs and pools in a row, with one backward pass for all of them.

    kernels/conv2d_stack.py explains what this saves. In everything else this class is a
    `torch.nn.Sequential`: names in a state_dict, access to layers and results are the same.
    With gradients enabled it does not call the layers one by one. Then their hooks are not called.

    Args:
        layers: each is a Conv2d with activation="relu" or a fused Conv2dReluPool; or one
            OrderedDict that holds such layers by name.

    Shapes: x [N, C, H, W] to the output of the last layer.
    """

    def __init__(self, *layers):
        super().__init__(*layers)
        for layer in self:
            _stacked(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        if not (torch.is_grad_enabled() and len(self)):
            return super().forward(x)
        parameters = itertools.chain(*((layer.weight, layer.bias) for layer in self))
        return conv2d_stack(x, *parameters, layers=tuple(_stacked(layer) for layer in self))


class MaxPool2d(nn.Module):
    """`torch.nn.MaxPool2d`: x [N, C, H, W] to [N, C, P, Q]. The stride is the window by default."""

    def __init__(self, kernel_size, stride=None, padding=0):
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the maximum of every window."""
        return max_pool2d(x, self.kernel_size, self.stride, self.padding)


class Softmax(nn.Module):
    """`torch.nn.Softmax` along `dim`, the last one by default."""

    def __init__(self, dim=-1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return exp(x) / sum(exp(x)), with the shape and dtype of x."""
        return softmax(x, self.dim)


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` of logits [N, classes] and int64 class indices [N]."""

    def __init__(self, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss: a scalar, or [N] if the reduction is "none"."""
        return cross_entropy(
            logits, target, self.ignore_index, self.label_smoothing, self.reduction
        )

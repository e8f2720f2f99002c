"""Layers: `torch.nn.Module`s that compute with our kernels instead of PyTorch's.

A layer adds nothing to the mathematics: it holds the parameters and calls one kernel. Where
torch.nn has parameters, the class here is a subclass of torch.nn's, so that names, shapes, default
initialisation and use of the random generator are the same by construction:

    torch.manual_seed(0); ours = Conv2d(3, 16, 3)
    torch.manual_seed(0); theirs = torch.nn.Conv2d(3, 16, 3)      # the same weights, bit for bit
    theirs.load_state_dict(ours.state_dict())                     # and a state_dict goes both ways

What is added is fusion, since on a GPU a ReLU of its own costs a trip through memory that its
arithmetic does not need: `activation="relu"` where torch.nn would use a second layer, and
`Conv2dReluPool`, which writes only the pooled quarter of what the convolution computes. `ConvStack`
fuses what lies between such layers on the way back.

Images are [N, C, H, W] as everywhere in PyTorch, and channels_last in memory: what these layers
return always, and what they should be given (`x.to(memory_format=torch.channels_last)`; contiguous
input works too). Filters lie likewise, as K rows of R*S*C, from when a layer is made: what a kernel
reads is there as it needs it, and nothing is packed or transposed from call to call. Loading a
state_dict copies into that memory, and so its values may lie in any order.
"""

import itertools

import torch
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
from torch import Tensor, nn


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
        # The kernel reads any strides: weight.t() is a view, nothing is transposed in memory.
        y = matmul(x.reshape(-1, x.shape[-1]), self.weight.t(), self.bias, self.activation)
        return y.reshape(*x.shape[:-1], self.out_features)


class FlattenLinear(Linear):
    """`torch.nn.Flatten` and `torch.nn.Linear`, of an image in channels_last, which is not copied.

    Flatten numbers the pixels of an image in the order (c, h, w). In channels_last they lie in the
    order (h, w, c), and so it copies every image at every step. A sum does not care in which order
    its terms are, as long as both factors have the same: so here the weights lie as the images do,
    and both are views, [N, H*W*C] and [out_features, H*W*C], whose rows TMA can read.

    Strides cannot say so of an [out_features, C*H*W]. The parameter is therefore what it is in
    truth, [out_features, C, H, W] like the filters of a convolution, in channels_last. A state_dict
    has it as torch.nn.Linear does, [out_features, C*H*W] in the order (c, h, w): there it is a copy
    (of one channel, a view), and the only one. What goes parameter by parameter, as the state of an
    optimizer, has four dimensions.

    It could be computed as the convolution that it is, with one output pixel. But each of the H*W
    taps would be a step of its own, of C terms; and the gradient of x would try every tap on every
    pixel, of which one fits.

    Args:
        in_shape: one image's (C, H, W).
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
        """Return activation(x W^T + b), x flattened."""
        if x.dim() != 4 or x.shape[1:] != self.in_shape:  # others of as many pixels would pass
            raise ValueError(f"x must be [N, *{list(self.in_shape)}], got {list(x.shape)}")
        rows = x.permute(0, 2, 3, 1).flatten(1)  # a view, of channels_last images
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return matmul(rows, weight.t(), self.bias, self.activation)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with zero padding, and an activation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device,
            dtype: as in torch.nn.Conv2d (padding in pixels, not "same" or "valid").
        activation: None or one of `matmul`'s, computed before the result leaves the kernel.
        im2col: compute through an explicit im2col matrix; slower, there to compare with.

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
        """Return activation(weight * x + bias)."""
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
    """Convolution (stride 1), bias, ReLU and 2x2 max-pool: one kernel, or three to compare with.

    Args:
        in_channels, out_channels, kernel_size, padding, device, dtype: as in torch.nn.Conv2d.
        how: "fused", all in one kernel; "separate", a kernel each for the convolution, bias with
            ReLU, and the pool; "im2col", like separate with an explicit im2col matrix.

    Shapes: x [N, C, H, W] to [N, K, P // 2, Q // 2] where [P, Q] is the convolution's size.
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
        """Return max_pool(relu(weight * x + bias))."""
        if self.how == "fused":
            return conv2d_relu_pool(x, self.weight, self.bias, self.padding)
        conv = conv2d if self.how == "separate" else conv2d_im2col
        y = conv(x, self.weight, padding=self.padding)
        return max_pool2d(bias_relu(y, self.bias), 2)


def _stacked(module: nn.Module) -> Layer:
    """What a stack has to know of a layer, or TypeError for one that it cannot have."""
    if isinstance(module, Conv2dReluPool) and module.how == "fused":
        return Layer(pool=True, padding=module.padding)
    if isinstance(module, Conv2d) and module.activation == "relu" and module.conv is conv2d:
        return Layer(False, module.stride, module.padding, module.dilation, module.groups)
    raise TypeError(
        'a stack is of Conv2d(..., activation="relu") and of fused Conv2dReluPool, got '
        f"{type(module).__name__}"
    )


class ConvStack(nn.Sequential):
    """Convolutions with ReLUs and pools in a row, which go back together: conv2d_stack.py.

    A `torch.nn.Sequential` in all but that: names in a state_dict, access and results are the same.
    With gradients enabled the layers are not called one by one, so their hooks are not, either.

    Args:
        layers: each a Conv2d with activation="relu" or a Conv2dReluPool, or one OrderedDict of
            them by name.

    Shapes: x [N, C, H, W] to what the last layer makes of it.
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
    """`torch.nn.MaxPool2d`: x [N, C, H, W] to [N, C, P, Q]. Stride defaults to the window."""

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
        """Return exp(x) / sum(exp(x)), same shape and dtype as x."""
        return softmax(x, self.dim)


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` of logits [N, classes] and int64 class indices [N]."""

    def __init__(self, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss: a scalar, or [N] for reduction "none"."""
        return cross_entropy(
            logits, target, self.ignore_index, self.label_smoothing, self.reduction
        )

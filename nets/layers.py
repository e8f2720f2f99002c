"""Layers: `torch.nn.Module`s that compute with our kernels instead of PyTorch's.

A layer adds nothing to the mathematics: it holds the parameters and calls one kernel. Where
torch.nn has parameters, the class here is a subclass of torch.nn's, so that names, shapes, default
initialisation and use of the random generator are the same by construction:

    torch.manual_seed(0); ours = Conv2d(3, 16, 3)
    torch.manual_seed(0); theirs = torch.nn.Conv2d(3, 16, 3)      # the same weights, bit for bit
    theirs.load_state_dict(ours.state_dict())                     # and a state_dict goes both ways

What is added is fusion, since on a GPU a ReLU of its own costs a trip through memory that its
arithmetic does not need: `activation="relu"` where torch.nn would use a second layer, and
`Conv2dReluPool`, which writes only the pooled quarter of what the convolution computes.

Images are [N, C, H, W] as everywhere in PyTorch. In memory the kernels prefer channels_last
(`x.to(memory_format=torch.channels_last)`); contiguous input works too.
"""

from torch import Tensor, nn

from kernels import (
    bias_relu,
    conv2d,
    conv2d_im2col,
    conv2d_relu_pool,
    cross_entropy,
    matmul,
    max_pool2d,
    softmax,
)


def _check_activation(activation):
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    return activation


class Linear(nn.Linear):
    """`torch.nn.Linear`, with an activation: y = activation(x W^T + b).

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        activation: None or "relu", computed before the result leaves the kernel.

    Shapes: x [..., in_features] to y [..., out_features]; weight [out_features, in_features].
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, activation=None
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = _check_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(x W^T + b)."""
        # The kernel reads any strides: weight.t() is a view, nothing is transposed in memory.
        y = matmul(x.reshape(-1, x.shape[-1]), self.weight.t(), self.bias, self.activation)
        return y.reshape(*x.shape[:-1], self.out_features)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with zero padding, and an activation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device,
            dtype: as in torch.nn.Conv2d (padding in pixels, not "same" or "valid").
        activation: None or "relu", computed before the result leaves the kernel.
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
        self.activation = _check_activation(activation)
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

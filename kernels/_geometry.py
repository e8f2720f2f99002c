"""The geometry that convolution, im2col and pooling share: windows that slide over an image.

    one dimension, R = 3 taps        stride 2, padding 1, dilation 1       P = 3 windows
    padded image   o # # # # # o     window 0: o # #
                                     window 1:     # # #
                                     window 2:         # # o

A tap is one of the R positions of a window; o is padding. Tap r of window p lies on the pixel
p*stride - padding + r*dilation. All of these sizes are in pixels. The second dimension is the same
with S taps and Q windows.
"""

from collections.abc import Sequence

import torch

from tilelab.kernels._checks import check_shape, check_tensors, pair
from tilelab.kernels.activation import check_activation


def output_size(
    size: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> tuple[int, int]:
    """Return (P, Q), the number of windows that fit into each dimension.

    P = floor((H + 2*padding - dilation*(R - 1) - 1) / stride) + 1, and Q likewise.
    """

    def windows(i: int) -> int:
        return (size[i] + 2 * padding[i] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1

    return windows(0), windows(1)


def check_geometry(
    name: str,
    taps: Sequence[int],
    size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return stride, padding and dilation as pairs, or raise for the first that is wrong.

    At least one window must fit into the padded image. `name` is the argument that gives its taps.
    """
    stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
    dilation = pair("dilation", dilation, 1)
    (R, S), (H, W), (pad_h, pad_w), (dil_h, dil_w) = taps, size, padding, dilation
    too_high = R < 1 or H + 2 * pad_h <= dil_h * (R - 1)
    if too_high or S < 1 or W + 2 * pad_w <= dil_w * (S - 1):
        i = 0 if too_high else 1
        raise ValueError(
            f"{name} must have at least one tap and fit into the padded image: its "
            f"{('height', 'width')[i]} is {taps[i]} taps with dilation {dilation[i]}, the image's "
            f"{size[i]} pixels with padding {padding[i]}"
        )
    return stride, padding, dilation


def check_groups(groups: int, channels: int) -> None:
    """Raise unless `groups` is an int that divides the channels of x."""
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")


def check_conv2d(x, weight, bias, stride, padding, dilation, groups, activation):
    """Raise if the arguments make no convolution. Return stride, padding and dilation as pairs."""
    check_tensors(x=x, weight=weight, bias=bias, optional=("bias",))
    if x.dim() != 4 or weight.dim() != 4:  # Search for the mistake only if there is one.
        check_shape("x", x, "[N, C, H, W]", N=None, C=None, H=None, W=None)
        check_shape("weight", weight, "[K, C/groups, R, S]", K=None, C=None, R=None, S=None)
    (_, channels, H, W), (K, C, R, S) = x.shape, weight.shape
    check_groups(groups, channels)
    if K % groups or channels != C * groups:
        raise ValueError(
            f"weight must be [K, C/groups, R, S] for x {list(x.shape)} and groups={groups}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (K,):
        check_shape("bias", bias, "[K]", K=K)
    check_activation(activation)
    return check_geometry("weight", (R, S), (H, W), stride, padding, dilation)


def empty_channels_last(
    size: Sequence[int], like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return an empty [N, C, H, W] on `like`'s device, channels_last whatever its sizes are.

    Its dtype is `dtype`, or else that of `like`.
    """
    memory = torch.channels_last
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory)


def as_pixels(x, stride, padding, groups):
    """Return x as [N*H*W, C], a view. A convolution with 1x1 filters is a matmul of it.

    Return None if there are groups, padding or a stride, if x is empty, or if it has no such view.
    """
    N, C, H, W = x.shape
    sn, sc, sh, sw = x.stride()
    if groups > 1 or any(s != 1 for s in stride) or any(padding) or not x.numel():
        return None
    apart = even_stride((N, H, W), (sn, sh, sw))
    return None if apart is None else x.as_strided((N * H * W, C), (apart, sc))


def even_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Return the one stride between all neighbours if the dimensions are flattened, or None."""
    stride = expected = None
    for size, s in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if stride is None:
                stride = s
            elif s != expected:
                return None
            expected = s * size
    return strides[0] if stride is None else stride

"""The geometry that convolution, im2col and pooling share: a window slid over an image.

    one dimension, R = 3 taps        stride 2, padding 1, dilation 1       P = 3 windows
    padded image   o # # # # # o     window 0: o # #
                                     window 1:     # # #
                                     window 2:         # # o

Sizes are in pixels. Window p has its tap r at p*stride - padding + r*dilation.
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
    """(P, Q), how many windows fit: floor((H + 2*padding - dilation*(R - 1) - 1)/stride) + 1."""

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
    """The pairs of stride, padding and dilation, or the error of the first that is wrong.

    `name` is the argument that gives the taps: one window at least must fit into the padded image.
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
    """`groups` is an int that divides the channels of x."""
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")


def check_conv2d(x, weight, bias, stride, padding, dilation, groups, activation):
    """Raise for what no convolution can be made of; return the pairs of the geometry."""
    check_tensors(x=x, weight=weight, bias=bias, optional=("bias",))
    if x.dim() != 4 or weight.dim() != 4:  # most calls are spared the search for what is wrong
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
    """[N, C, H, W] of `like`'s dtype and device, channels_last whatever the sizes."""
    memory = torch.channels_last
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory)


def as_pixels(x, stride, padding, groups):
    """Return x as [N*H*W, C], a view, where a filter of one pixel is no more than a matmul."""
    N, C, H, W = x.shape
    sn, sc, sh, sw = x.stride()
    if groups > 1 or any(s != 1 for s in stride) or any(padding) or not x.numel():
        return None
    apart = even_stride((N, H, W), (sn, sh, sw))
    return None if apart is None else x.as_strided((N * H * W, C), (apart, sc))


def even_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """From one element to the next, if all of them, in this order, lie evenly; None if not."""
    stride = expected = None
    for size, s in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if stride is None:
                stride = s
            elif s != expected:
                return None
            expected = s * size
    return strides[0] if stride is None else stride

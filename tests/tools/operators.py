"""The operators, each one row: what the contract suite (test_contracts.py) tests them with.

A new operator gets the whole contract by a row here. The contract asks for right results and
gradients for every sample and every tile, in any layout, in poisoned memory, and past 2^31
elements. It asks for the same bits twice, and for an error on wrong input. An operator's own test
file has what is special to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.tools import wrong_inputs
from tests.tools.convolutions import CONVS, CORE, FEW, GROUPED, MANY, Conv, integers
from tests.tools.inputs import DEVICE, DTYPES, laid_out, randn
from tilelab import kernels
from tilelab.kernels.bias_relu import TILES as BIAS_RELU_TILES
from tilelab.kernels.bias_relu import reference as bias_relu
from tilelab.kernels.conv2d import FEW_CHANNELS
from tilelab.kernels.conv2d import TILES as CONV2D_TILES
from tilelab.kernels.conv2d import reference as conv2d
from tilelab.kernels.conv2d_depthwise import MORE_TAPS
from tilelab.kernels.conv2d_depthwise import TILES as DEPTHWISE_TILES
from tilelab.kernels.conv2d_input_grad import TILES as INPUT_GRAD_TILES
from tilelab.kernels.conv2d_relu_pool import TILES as RELU_POOL_TILES
from tilelab.kernels.conv2d_relu_pool import reference as conv2d_relu_pool
from tilelab.kernels.conv2d_relu_pool_grad import TILES as RELU_POOL_GRAD_TILES
from tilelab.kernels.conv2d_relu_pool_grad import UNPOOL_TILES
from tilelab.kernels.conv2d_stack import Layer
from tilelab.kernels.conv2d_stack import reference as conv2d_stack
from tilelab.kernels.conv2d_weight_grad import TILES as WEIGHT_GRAD_TILES
from tilelab.kernels.cross_entropy import TILES as CROSS_ENTROPY_TILES
from tilelab.kernels.cross_entropy import reference as cross_entropy
from tilelab.kernels.im2col import TILES as IM2COL_TILES
from tilelab.kernels.im2col import reference as im2col
from tilelab.kernels.matmul import TILES as MATMUL_TILES
from tilelab.kernels.matmul import reference as matmul
from tilelab.kernels.pool import TILES as POOL_TILES
from tilelab.kernels.scaled_matmul import TILES as SCALED_MATMUL_TILES
from tilelab.kernels.scaled_matmul import reference as scaled_matmul
from tilelab.kernels.softmax import TILES as SOFTMAX_TILES

CUDNN, CUBLAS = torch.backends.cudnn.conv, torch.backends.cuda.matmul
FP8, INT8 = torch.float8_e4m3fn, torch.int8


class Sample(NamedTuple):
    """One call.

    Attributes:
        tensors: its first arguments, in order: a shape, None, or a function of a seed that makes a
            tensor of no gradient (classes, say).
        options: its further arguments.
        core: whether it also runs with the oldest versions.
    """

    tensors: tuple
    options: dict = {}
    core: bool = False


class Operator(NamedTuple):
    """What there is to know of an operator, for a test of any.

    Attributes:
        function: the public one.
        reference: the same in plain torch, for any dtype.
        samples: {reason: Sample}; the first ones are the typical ones.
        lies: how the result and then the gradients lie in memory: "row-major", "channels_last", or
            "argument 0" for as that argument does.
        tiles: {name of an op: (its tiles, the sample that is larger than a tile)}.
        wrong: see wrong_inputs.py.
        empty: samples without elements.
        real: samples for a GPU.
        exact: whether all its arithmetic is exact in small integers.
        terms: otherwise, of how many terms a result is a sum.
        dtypes: that its floating arguments can have, and are exact in.
        switch: of torch's, that TF32 follows; None if there are no products.
        layouts: how many of the first samples are tried in every layout.
        far: the arguments, and the "gradient" of the output, that may have more than 2^31 elements.
        inference: whether it refuses what requires a gradient.
        rows: whether dim 0 of the first argument is a batch, whose members do not see each other.
    """

    function: Callable
    reference: Callable
    samples: dict[str, Sample]
    lies: tuple[str, ...]
    tiles: dict[str, tuple[list[dict], Callable[[dict], Sample]]]
    wrong: dict[str, tuple]
    empty: dict[str, Sample]
    real: dict[str, Sample] = {}
    exact: bool = True
    terms: int = 1
    dtypes: list = DTYPES
    switch: Any = None
    layouts: int = 1
    far: tuple[str, ...] = ("0", "gradient")
    inference: bool = False
    rows: bool = True

    @property
    def differentiable(self) -> bool:
        """Whether it has gradients."""
        return len(self.lies) > 1


def tensors_of(operator: Operator, sample: Sample, dtype: torch.dtype, seed: int = 0) -> list:
    """The tensors of a call: small integers, or normally distributed where nothing is exact."""
    values = integers if operator.exact else spread
    return [
        argument(seed + i)
        if callable(argument)
        else None
        if argument is None
        else values(*argument, dtype=dtype, seed=seed + i)
        for i, argument in enumerate(sample.tensors)
    ]


def spread(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of three times a normal distribution some elements of a row matter, and most do not."""
    return (3 * randn(*shape, seed=seed)).to(dtype)


def upstream(operator: Operator, y: torch.Tensor, sample: Sample, dtype: torch.dtype):
    """A gradient of the output."""
    if operator.exact:
        return integers(*y.shape, dtype=dtype, seed=9)
    dy = randn(*y.shape, seed=9).abs() + 0.5
    if y.dim() == 0:  # or the gradients of a mean would lose digits in float16
        dy *= min(1000, sample.tensors[1](0).numel())
    return dy.to(dtype)


# --- convolutions ---------------------------------------------------------------------------------


def geometry(conv: Conv, **more) -> dict:
    names = ("stride", "padding", "dilation", "groups")
    return dict(zip(names, conv.args, strict=True)) | more


def convolution(conv: Conv, bias: bool = True, core: bool = False, **more) -> Sample:
    """A call of conv2d."""
    tensors = (conv.x, conv.weight, (conv.filters,))
    return Sample(tensors[: 2 + bias], geometry(conv, **more), core)


def every_geometry(core=()) -> dict[str, Sample]:
    """Each of CONVS; every second with a bias, and of these every second with a ReLU."""
    found = {
        "few channels": convolution(FEW, activation="relu", core=True),
        "many channels": convolution(MANY, activation="relu", core=True),
        "groups": convolution(GROUPED, core=True),
    }
    for i, (name, conv) in enumerate(CONVS.items()):
        activation = dict(activation="relu") if i % 4 == 0 else {}
        found[name] = convolution(conv, i % 2 == 0, name in core, **activation)
    return found


def larger(tile: dict, few: bool) -> Sample:
    """A tile and a remainder along pixels, filters and the sum: the forward."""
    if few:  # the sum is over taps and channels
        C, taps = tile["BLOCK_K"] // 6 + 1, (3, 2)
        assert tile["BLOCK_K"] < C * taps[0] * taps[1] and C < FEW_CHANNELS
    else:
        C, taps = tile["BLOCK_K"] + 5, (1, 2)
    x = (3, C, 2 + taps[0], -(-tile["BLOCK_M"] // 9) + 2)
    return convolution(Conv(x, tile["BLOCK_N"] + 3, taps, padding=(0, 1)), activation="relu")


def larger_input(tile: dict) -> Sample:
    """The same of pixels, channels and filters: the input gradient."""
    x = (3, tile["BLOCK_N"] + 3, 3, -(-tile["BLOCK_M"] // 9) + 1)
    return convolution(Conv(x, tile["BLOCK_K"] + 5, (1, 2), padding=(0, 1)), False)


def larger_weight(tile: dict) -> Sample:
    """The same of filters, (r, s, c) and pixels: the weight gradient."""
    x = (1, tile["BLOCK_N"] // 2 + 3, 3, -(-tile["BLOCK_K"] // 3) + 2)
    return convolution(Conv(x, tile["BLOCK_M"] + 3, (1, 2)))


NO_IMAGES = Conv((0, 18, 6, 7), 4, (3, 2), 2, 1)
RESNET_50 = {
    "first": Conv((32, 3, 224, 224), 64, (7, 7), 2, 3),
    "1x1 out of a bottleneck": Conv((32, 64, 56, 56), 256, (1, 1)),
    "3x3": Conv((32, 64, 56, 56), 64, (3, 3), 1, 1),
    "3x3 of stride 2": Conv((32, 128, 56, 56), 128, (3, 3), 2, 1),
    "shortcut of stride 2": Conv((32, 256, 56, 56), 512, (1, 1), 2),
    "last 3x3": Conv((32, 512, 7, 7), 512, (3, 3), 1, 1),
    "VGG16, widest": Conv((16, 512, 28, 28), 512, (3, 3), 1, 1),
    "ResNeXt, 32 groups": Conv((32, 128, 56, 56), 128, (3, 3), 1, 1, 1, 32),
    "DeepLab, dilation 6": Conv((8, 256, 33, 33), 256, (3, 3), 1, 6, 6),
}


def depthwise(N, C, H, W, *rest, core=False, bias=True, **more) -> Sample:
    """A convolution of C channels and filters; `rest` is taps, stride, padding, dilation."""
    taps, stride, padding, dilation = (*rest, *(1, 0, 1)[len(rest) - 1 :])
    return convolution(
        Conv((N, C, H, W), C, taps, stride, padding, dilation, C), bias, core, **more
    )


DEPTHWISE = {
    "3x2, stride (2, 1)": depthwise(2, 3, 7, 5, (3, 2), (2, 1), 1, core=True, activation="relu"),
    "3x3 of the same size": depthwise(2, 5, 8, 9, (3, 3), 1, 1, core=True),
    "several chunks of several steps": depthwise(
        3, 18, 23, 9, (3, 2), (2, 1), 1, core=True, activation="relu"
    ),
    "one pixel, one channel, one tap": depthwise(1, 1, 1, 1, (1, 1)),
    "1x1: a scale a channel": depthwise(2, 5, 4, 6, (1, 1), activation="relu"),
    "3x3 without padding": depthwise(2, 16, 8, 9, (3, 3), bias=False),
    "a last patch that is not full": depthwise(2, 8, 5, 7, (3, 3), 1, 1, core=True),
    "an image smaller than a patch": depthwise(3, 8, 1, 3, (1, 3), 1, (0, 1)),
    "one column": depthwise(2, 6, 9, 1, (3, 1), 1, (1, 0)),
    "filter as large as x": depthwise(3, 4, 5, 6, (5, 6), bias=False),
    "filter larger than x": depthwise(2, 3, 2, 3, (5, 4), 1, 2),
    "C=17, one more than the least tile": depthwise(1, 17, 6, 7, (3, 3), 1, 1),
    "C=33, not few": depthwise(1, 33, 6, 7, (3, 3), 1, 1, activation="relu"),
    "C=144, more than two blocks of 64": depthwise(1, 144, 6, 5, (3, 3), 1, 1, core=True),
    "2x5": depthwise(2, 4, 7, 9, (2, 5)),
    "5x2": depthwise(2, 4, 9, 7, (5, 2), 1, (2, 1)),
    "4x4, of even size": depthwise(2, 3, 7, 8, (4, 4), 1, 2),
    "9 taps in a row": depthwise(2, 3, 3, 12, (1, 9), 1, (0, 4)),
    "5x5": depthwise(2, 6, 9, 8, (5, 5), 1, 2),
    "7x7, the most taps": depthwise(1, 6, 9, 10, (7, 7), 1, 3, core=True),
    "stride 2, an odd image": depthwise(2, 4, 9, 11, (3, 3), 2, 1, core=True),
    "stride 2, an even image": depthwise(2, 4, 8, 10, (3, 3), 2, 1),
    "stride 2 that leaves a row and a column unread": depthwise(2, 4, 8, 10, (3, 3), 2),
    "stride as long as the filter: nothing is shared": depthwise(2, 4, 9, 12, (3, 3), 3),
    "stride longer than the filter": depthwise(2, 4, 11, 12, (2, 2), 4, 1, core=True),
    "stride longer than x": depthwise(2, 3, 4, 5, (2, 2), (9, 8)),
    "stride (1, 3)": depthwise(2, 4, 6, 11, (3, 3), (1, 3), 1),
    "stride (3, 1)": depthwise(2, 4, 11, 6, (3, 3), (3, 1), 1),
    "padding larger than needed": depthwise(1, 3, 4, 5, (3, 3), 1, 4),
    "padding (2, 0)": depthwise(2, 3, 6, 7, (3, 3), 1, (2, 0)),
    "padding (0, 2), stride 2": depthwise(2, 3, 6, 7, (3, 3), 2, (0, 2)),
    "dilation 2": depthwise(1, 4, 9, 10, (3, 3), 1, 2, 2),
    "dilation (1, 3): dense along one side": depthwise(
        1, 4, 9, 10, (3, 3), 1, 1, (1, 3), core=True
    ),
    "dilation (3, 1), stride 2": depthwise(1, 4, 9, 10, (3, 3), 2, (3, 1), (3, 1)),
    "dilation far apart": depthwise(1, 4, 60, 4, (2, 2), 1, 1, (50, 1)),
    "everything at once": depthwise(2, 18, 12, 11, (4, 3), (3, 2), (3, 1), (2, 4), core=True),
}


def larger_depthwise(tile: dict) -> Sample:
    """A tile and a remainder along pixels and channels, and several steps of stride 2."""
    return depthwise(1, tile["BLOCK_N"] + 3, 4 * tile["ROWS"] + 2, 18, (3, 3), 2, 1)


# --- a convolution with a pool, and as columns ----------------------------------------------------


def pooled(x, filters, taps, padding=0, bias=True, core=False) -> Sample:
    """A call of conv2d_relu_pool."""
    return Sample(
        ((*x,), (filters, x[1], *taps), (filters,))[: 2 + bias], dict(padding=padding), core
    )


RELU_POOL = {
    "an odd row is dropped": pooled((2, 3, 7, 8), 5, (3, 3), 1, core=True),
    "one window, one tap": pooled((1, 1, 2, 2), 1, (1, 1)),
    "one window": pooled((1, 1, 4, 4), 1, (3, 3), core=True),
    "one window a batch": pooled((19, 2, 4, 4), 3, (3, 3), bias=False),
    "the demo's first block, small": pooled((2, 1, 12, 12), 16, (3, 3)),
    "the demo's second block, small": pooled((2, 16, 9, 9), 32, (3, 3)),
    "one filter": pooled((2, 5, 8, 6), 1, (3, 3), 1, bias=False),
    "17 filters, 17 channels": pooled((1, 17, 6, 8), 17, (3, 3), 1, core=True),
    "15 channels": pooled((1, 15, 7, 6), 9, (3, 2)),
    "130 channels": pooled((1, 130, 4, 6), 5, (2, 2)),
    "130 filters": pooled((1, 3, 6, 4), 130, (2, 2)),
    "1x1": pooled((2, 5, 6, 8), 7, (1, 1)),
    "1x1, a frame of padding": pooled((2, 5, 6, 8), 7, (1, 1), 1),
    "2x2": pooled((2, 3, 7, 9), 4, (2, 2), bias=False),
    "2x5": pooled((2, 3, 7, 9), 4, (2, 5), core=True),
    "5x2": pooled((2, 3, 9, 7), 4, (5, 2)),
    "5x5, padding 2": pooled((1, 3, 8, 6), 4, (5, 5), 2, core=True),
    "1x3": pooled((2, 3, 4, 8), 5, (1, 3)),
    "3x1": pooled((2, 3, 8, 4), 5, (3, 1)),
    "4x4": pooled((2, 3, 9, 8), 5, (4, 4), 1),
    "7x7, as large as x": pooled((2, 2, 8, 8), 5, (7, 7)),
    "an odd column is dropped": pooled((2, 3, 8, 7), 5, (3, 3)),
    "both are dropped": pooled((2, 3, 7, 7), 5, (3, 3)),
    "both are dropped, padding 1": pooled((2, 3, 7, 9), 5, (3, 3), 1),
    "padding 1, even": pooled((2, 3, 8, 8), 5, (3, 3), 1),
    "padding 2: a rim of more bias": pooled((2, 3, 7, 6), 5, (3, 3), 2),
    "padding 3 of 2x2: windows of padding alone": pooled((1, 3, 4, 5), 5, (2, 2), 3),
    "padding (2, 0)": pooled((2, 3, 5, 8), 5, (3, 3), (2, 0), core=True),
    "padding (0, 1)": pooled((2, 3, 8, 5), 5, (3, 3), (0, 1)),
    "padding makes it fit": pooled((2, 3, 2, 2), 5, (3, 3), 1),
    "one row of windows": pooled((2, 3, 4, 20), 5, (3, 3)),
    "one column of windows": pooled((2, 3, 20, 4), 5, (3, 3)),
}


def fold(columns, size, kernel_size, *args, **options):
    """What col2im should return: the transpose of im2col."""
    x = torch.zeros(size, dtype=columns.dtype, device=columns.device).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(
            im2col(x, kernel_size, *args, **options), x, columns, create_graph=True
        )[0]


def copies(conv: Conv) -> Sample:
    """A call of im2col."""
    return Sample((conv.x,), geometry(conv, kernel_size=conv.taps))


def sums(conv: Conv) -> Sample:
    """A call of col2im."""
    N, _, P, Q = conv.y
    columns = N * P * Q, conv.x[1] * conv.taps[0] * conv.taps[1]
    return Sample((columns,), geometry(conv, size=conv.x, kernel_size=conv.taps))


COLUMNS = {
    "groups": GROUPED,
    "few channels": FEW,
    "many channels": MANY,
    "one pixel": CONVS["all of size 1"],
    "stride 3 of 2x2: unread pixels between windows": CONVS[
        "stride 3 of 2x2: unread pixels between windows"
    ],
    "padding larger than x, stride 2": CONVS["padding larger than x, stride 2"],
    "dilation 6, stride 4: gcd 2": CONVS["dilation 6, stride 4: gcd 2"],
}


def larger_copies(tile: dict) -> Sample:
    width = tile["BLOCK_M"] // 3 + 2
    return copies(Conv((1, tile["BLOCK_N"] // 4 + 3, 4, width), 1, (2, 2), padding=(0, 1)))


def larger_sums(tile: dict) -> Sample:
    width = tile["BLOCK_M"] // 3 + 2
    return sums(Conv((1, tile["BLOCK_N"] + 3, 3, width), 1, (2, 1), padding=(1, 0)))


# --- pooling --------------------------------------------------------------------------------------


def pool(x, kernel_size, stride=None, padding=0, core=False) -> Sample:
    return Sample((x,), dict(kernel_size=kernel_size, stride=stride, padding=padding), core)


POOLS = {
    "ResNet's 3x3 at stride 2": pool((2, 5, 9, 11), 3, 2, 1, core=True),
    "one pixel": pool((1, 1, 1, 1), 1),
    "windows of one pixel": pool((2, 3, 5, 7), 1),
    "windows of one pixel, apart": pool((2, 3, 5, 7), 1, 3),
    "the demo's 2x2": pool((2, 16, 8, 8), 2, core=True),
    "2x2, the last row and column left out": pool((2, 3, 7, 9), 2),
    "AlexNet's 3x3 at stride 2, no padding": pool((2, 5, 9, 11), 3, 2),
    "every window overlaps every neighbour": pool((2, 3, 6, 7), 3, 1, 1, core=True),
    "stride that does not divide the window": pool((2, 3, 11, 13), 5, 3, 2),
    "stride that does not divide the image": pool((2, 3, 10, 11), 2, 3),
    "stride longer than the window": pool((2, 3, 13, 17), 2, 5),
    "stride longer than the image": pool((2, 3, 4, 5), 2, 9),
    "the whole image": pool((2, 3, 5, 7), (5, 7)),
    "the whole image and its padding": pool((2, 3, 4, 6), (8, 12), 1, (2, 3)),
    "larger than the image": pool((2, 3, 3, 3), 5, 1, 2),
    "as much padding as allowed, even": pool((2, 3, 5, 6), 4, 2, 2),
    "as much padding as allowed, odd": pool((2, 3, 5, 6), 5, 2, 2),
    "half of a 2x2 window is padding": pool((2, 3, 5, 6), 2, 2, 1),
    "a tall window": pool((2, 3, 9, 8), (5, 2), (2, 1), (2, 0)),
    "a wide window": pool((2, 3, 8, 9), (1, 4), (3, 2), (0, 2)),
    "strides differ": pool((2, 3, 9, 9), 3, (1, 4)),
    "padding differs": pool((2, 3, 9, 9), 3, 2, (0, 1)),
    "a large window": pool((1, 2, 20, 20), 13, 1, 6),
    "one channel": pool((3, 1, 9, 8), 3, 2, 1),
    "17 channels: one more than the least tile": pool((2, 17, 9, 8), 3, 2, 1),
    "65 channels: one more than a tile": pool((1, 65, 5, 4), 2),
    "one row": pool((2, 3, 1, 20), (1, 3), 2, (0, 1)),
    "one column": pool((2, 3, 20, 1), (3, 1), 2, (1, 0)),
    "many small images": pool((40, 3, 2, 2), 2),
    "primes": pool((3, 5, 23, 19), (3, 7), (2, 5), (1, 3)),
    "an image without a batch": pool((5, 9, 11), 3, 2, 1, core=True),
    "several of the interpreter's large tiles": pool((3, 90, 24, 26), 3, 1, 1, core=True),
}


# --- rows -----------------------------------------------------------------------------------------


def classes(*shape: int, high: int) -> Callable[[int], torch.Tensor]:
    """A function of a seed: random classes; the first and the last are among them."""

    def make(seed: int) -> torch.Tensor:
        target = torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
        if target.numel() > 1:
            target.view(-1)[0], target.view(-1)[-1] = high - 1, 0
        return target.to(DEVICE)

    return make


def losses(shape: tuple, core: bool = False, **options) -> Sample:
    """A call of cross_entropy."""
    rows = list(shape)
    high = rows.pop(min(1, len(rows) - 1))
    return Sample((shape, classes(*rows, high=high)), options, core)


CROSS_ENTROPY = {
    "pixels of segmentation": losses((2, 21, 9, 7), core=True),
    "a classifier": losses((64, 10), core=True, label_smoothing=0.1, ignore_index=3),
    "one row": losses((1, 10)),
    "one row without a batch": losses((10,), reduction="sum"),
    "two classes": losses((40, 2), reduction="none"),
    "classes of a power of two": losses((33, 64), label_smoothing=1.0),
    "one more": losses((33, 65), reduction="sum", ignore_index=0),
    "one less": losses((33, 63), label_smoothing=0.2),
    "primes": losses((97, 53), reduction="none", label_smoothing=0.1, core=True),
    "a sequence": losses((3, 11, 7), ignore_index=3, reduction="none"),
    "a sequence of length 1": losses((5, 11, 1)),
    "images of one pixel": losses((5, 11, 1, 1), label_smoothing=0.3),
    "more rows than a program of the interpreter takes": losses((9001, 13)),
    "1024 classes: the interpreter's longest in registers": losses((3, 1024)),
    "1025 classes: its shortest online": losses((3, 1025), label_smoothing=0.1),
    "several blocks of classes": losses((3, 3000), reduction="none", ignore_index=7),
}


def along(shape: tuple, dim: int = -1, core: bool = False) -> Sample:
    """A call of softmax."""
    return Sample((shape,), dict(dim=dim), core)


SOFTMAX = {
    "pixels of segmentation": along((2, 21, 9, 7), 1, core=True),
    "one row": along((1, 50)),
    "rows of two": along((40, 2)),
    "a classifier's output": along((64, 10), 1, core=True),
    "rows of a power of two": along((33, 64)),
    "one more": along((33, 65)),
    "one less": along((33, 63)),
    "primes": along((97, 53), core=True),
    "columns": along((53, 97), 0, core=True),
    "a vector": along((100,), 0),
    "attention scores": along((2, 3, 17, 19)),
    "images of one pixel": along((5, 21, 1, 1), 1),
    "across the batch": along((9, 3, 5, 2), 0),
    "more rows than a program of the interpreter takes": along((9001, 13)),
    "rows of 1024: the interpreter's longest in registers": along((3, 1024)),
    "rows of 1025: its shortest online": along((3, 1025)),
    "rows of several blocks": along((3, 3000)),
}

BIAS_RELU = {
    "images": Sample(((2, 5, 4, 3), (5,)), core=True),
    "a matrix": Sample(((9, 6), (6,)), core=True),
    "one element": Sample(((1, 1), (1,))),
    "one row": Sample(((1, 50), (50,))),
    "one channel": Sample(((50, 1), (1,))),
    "exactly one tile": Sample(((16, 64), (64,))),
    "one more than a tile": Sample(((17, 65), (65,))),
    "one less than a tile": Sample(((15, 63), (63,))),
    "primes": Sample(((97, 53), (53,))),
    "a sequence": Sample(((3, 7, 11), (7,)), core=True),
    "a sequence of length 1": Sample(((5, 7, 1), (7,))),
    "one image": Sample(((1, 6, 9, 8), (6,))),
    "images of one pixel": Sample(((5, 6, 1, 1), (6,))),
    "one channel of images": Sample(((2, 1, 9, 8), (1,))),
    "H and W differ much": Sample(((2, 3, 1, 70), (3,))),
    "several of the interpreter's large tiles": Sample(((3, 1030, 11, 13), (1030,)), core=True),
}

BIAS_ACTIVATION = {
    "GELU": Sample(((2, 5, 4, 3), (5,)), dict(activation="gelu"), core=True),
    "its tanh form": Sample(((17, 65), (65,)), dict(activation="gelu_tanh")),
    "SiLU": Sample(((3, 7, 11), (7,)), dict(activation="silu"), core=True),
    "no bias": Sample(((9, 6), None), dict(activation="silu")),
    "ReLU": Sample(((9, 6), (6,)), dict(activation="relu")),
}


# --- products -------------------------------------------------------------------------------------


def product(M, N, K, bias=True, core=False, **options) -> Sample:
    """A call of matmul."""
    return Sample(((M, K), (K, N), (N,))[: 2 + bias], options, core)


MATMUL = {
    "one more than a tile": product(17, 17, 17, core=True, activation="relu"),
    "primes": product(37, 41, 43, core=True),
    "all of size 1": product(1, 1, 1),
    "one row": product(1, 40, 30),
    "one column": product(40, 1, 30, bias=False),
    "a ReLU and no bias": product(33, 35, 20, bias=False, activation="relu"),
    "outer product, K=1": product(20, 30, 1),
    "dot product": product(1, 1, 100, bias=False),
    "smaller than the smallest tile": product(3, 5, 7, activation="relu"),
    "exactly one smallest tile": product(16, 16, 16, bias=False),
    "one less than a tile": product(15, 15, 15),
    "tall and skinny: a classifier": product(130, 10, 288),
    "short and wide": product(9, 200, 33, activation="relu"),
    "K beyond one step, no multiple of it": product(20, 24, 300, core=True),
    "K beyond one step, a multiple of it": product(20, 24, 256, bias=False, core=True),
    "deep K": product(8, 8, 3000),
    "several of the interpreter's large tiles": product(
        1030, 1027, 130, core=True, activation="relu"
    ),
}


def eight_bit(*shape: int, dtype: torch.dtype, transposed: bool = False) -> Callable:
    """A function of a seed: small integers, so that sums are exact in float8 too."""

    def make(seed: int) -> torch.Tensor:
        x = integers(*(shape[::-1] if transposed else shape), seed=seed).to(dtype)
        return x.t() if transposed else x

    return make


def scale(*shape: int) -> Callable:
    """A function of a seed: scales of 1, 2 and 4."""
    return lambda seed: 2.0 ** integers(*shape, seed=seed, low=0, high=2)


def scaled(
    M, N, K, operands=INT8, bias=True, rows=True, columns=True, core=False, **options
) -> Sample:
    """A call of scaled_matmul, with a scale for each row and column or one for all."""
    tensors = (
        eight_bit(M, K, dtype=operands), eight_bit(K, N, dtype=operands, transposed=True),
        scale(M) if rows else scale(), scale(N) if columns else scale(),
        lambda seed: integers(N, dtype=torch.bfloat16, seed=seed),
    )  # fmt: skip
    return Sample(tensors[: 4 + bias], options, core)


SCALED_MATMUL = {
    "primes": scaled(37, 41, 43, core=True, activation="relu"),
    "float8": scaled(37, 41, 43, FP8, core=True),
    "one scale for all": scaled(19, 23, 21, rows=False, columns=False),
    "one scale for A": scaled(19, 23, 21, FP8, rows=False),
    "scales as matrices": Sample(
        (
            eight_bit(6, 32, dtype=INT8), eight_bit(32, 8, dtype=INT8),
            scale(6, 1), scale(1, 8),
        )
    ),
    "float32 results": scaled(20, 24, 300, bias=False, dtype=torch.float32),
    "all of size 1": scaled(1, 1, 1),
    "one token": scaled(1, 48, 64, FP8),
    "one column": scaled(40, 1, 30),
    "outer product, K=1": scaled(20, 30, 1, FP8),
    "dot product": scaled(1, 1, 100),
    "K below a tensor core's 32": scaled(17, 17, 17, activation="relu"),
    "exactly one smallest tile": scaled(16, 16, 32, FP8, bias=False),
    "one more": scaled(17, 17, 33),
    "K beyond one step, no multiple of it": scaled(20, 24, 300, FP8),
    "deep K": scaled(8, 8, 3000),
}  # fmt: skip


def stack(layers, *filters) -> Sample:
    """A call of conv2d_stack on an image of 3 channels; `filters` are (K, taps) of each layer."""
    tensors, C = [(2, 3, 11, 12)], 3
    for layer, (K, taps) in zip(layers, filters, strict=True):
        tensors += [(K, C // layer.groups, *taps), (K,)]
        C = K
    return Sample(tuple(tensors), dict(layers=tuple(layers)))


STACKS = {
    "two layers": stack([Layer(padding=1), Layer(padding=1)], (4, (3, 3)), (5, (3, 3))),
    "a pool behind": stack(
        [Layer(stride=(1, 2), padding=1), Layer(True)], (4, (3, 3)), (5, (2, 3))
    ),
    "groups behind a pool": stack([Layer(True), Layer(groups=2)], (4, (2, 3)), (6, (3, 2))),
}


def beyond(m: int, n: int, k: int | None = None) -> Callable[[dict], tuple]:
    """Of a tile, the sizes of its blocks and a remainder of each."""

    def sizes(tile: dict) -> tuple:
        found = tile["BLOCK_M"] + m, tile["BLOCK_N"] + n
        return found if k is None else (*found, tile["BLOCK_K"] + k)

    return sizes


OPERATORS = {
    "matmul": Operator(
        kernels.matmul, matmul, MATMUL, ("row-major", "argument 0", "argument 1", "row-major"),
        {"matmul": (
            MATMUL_TILES, lambda tile: product(*beyond(5, 3, 9)(tile), activation="relu")
        )},
        wrong_inputs.MATMUL,
        {
            f"{M}x{N}x{K}": product(M, N, K, activation=activation)
            for M, N, K, activation in [
                (0, 5, 4, None), (5, 0, 4, "relu"), (5, 4, 0, None), (5, 4, 0, "relu"),
                (0, 5, 0, None), (0, 0, 0, "relu"),
            ]
        },
        {
            "square": product(4096, 4096, 4096), "odd": product(4095, 4097, 4093),
            "classifier": product(65_536, 10, 800), "deep K": product(64, 4096, 50_000),
        },
        switch=CUBLAS, layouts=2, far=("0", "1"),
    ),
    "scaled_matmul": Operator(
        kernels.scaled_matmul, lambda *xs, dtype=None, **options: scaled_matmul(*xs, **options),
        SCALED_MATMUL, ("row-major",),
        {"scaled_matmul": (
            SCALED_MATMUL_TILES, lambda tile: scaled(*beyond(5, 3, 9)(tile), activation="relu")
        )},
        wrong_inputs.SCALED_MATMUL,
        {
            f"{M}x{N}x{K}": scaled(M, N, K, bias=bias)
            for M, N, K, bias in [(0, 16, 32, 1), (16, 0, 32, 0), (16, 16, 0, 1), (16, 16, 0, 0)]
        },
        {"square": scaled(4096, 4096, 4096), "one token": scaled(1, 4096, 4096),
         "odd": scaled(4095, 4097, 4093)},
        dtypes=[torch.bfloat16], far=("0", "1"), inference=True,
    ),
    "bias_relu": Operator(
        kernels.bias_relu, bias_relu, BIAS_RELU, ("argument 0", "argument 0", "row-major"),
        dict.fromkeys(("bias_relu", "bias_relu_backward"), (
            BIAS_RELU_TILES, lambda tile: Sample((beyond(5, 3)(tile), (tile["BLOCK_N"] + 3,)))
        )),
        wrong_inputs.BIAS_RELU,
        {str(s): Sample((s, (s[1],))) for s in [(0, 5), (5, 0), (0, 3, 4, 4), (2, 3, 0, 4)]},
        {"images": Sample(((64, 64, 112, 112), (64,))), "odd": Sample(((128, 513, 7, 7), (513,)))},
        layouts=2, far=("0",),
    ),
    "bias_activation": Operator(
        kernels.bias_activation, bias_relu, BIAS_ACTIVATION,
        ("argument 0", "argument 0", "row-major"),
        dict.fromkeys(("bias_relu", "bias_relu_backward"), (
            BIAS_RELU_TILES, lambda tile: Sample(
                (beyond(5, 3)(tile), (tile["BLOCK_N"] + 3,)), dict(activation="gelu")
            )
        )),
        {}, {"no rows": Sample(((0, 5), (5,)), dict(activation="silu"))},
        exact=False, terms=64, far=("0",),
    ),
    "conv2d": Operator(
        kernels.conv2d, conv2d, every_geometry(CORE),
        ("channels_last", "channels_last", "argument 1", "row-major"),
        {
            "conv2d": (CONV2D_TILES, lambda tile: larger(tile, False)),
            "conv2d_flat": (CONV2D_TILES, lambda tile: larger(tile, True)),
            "conv2d_input_grad": (INPUT_GRAD_TILES, larger_input),
            "conv2d_weight_grad": (WEIGHT_GRAD_TILES, larger_weight),
        },
        wrong_inputs.CONV2D,
        {"no images": convolution(NO_IMAGES),
         "few channels": convolution(Conv((0, 5, 6, 7), 4, (3, 2)), activation="relu")},
        {name: convolution(conv) for name, conv in RESNET_50.items()},
        switch=CUDNN, layouts=3, far=("0", "2", "gradient"),
    ),
    "depthwise": Operator(
        kernels.conv2d, conv2d, DEPTHWISE,
        ("channels_last",),  # its gradients are those of any convolution
        {"conv2d_depthwise": ([*DEPTHWISE_TILES, *MORE_TAPS.values()], larger_depthwise)},
        {}, {"no images": depthwise(0, 5, 6, 7, (3, 2), 2, 1)},
        {"MobileNet v2": depthwise(32, 144, 56, 56, (3, 3), 2, 1),
         "7x7": depthwise(16, 192, 28, 28, (7, 7), 1, 3)},
        far=("0",),
    ),
    "conv2d_im2col": Operator(
        kernels.conv2d_im2col, conv2d, every_geometry(),
        ("channels_last", "channels_last", "anyhow", "row-major"),
        {}, wrong_inputs.CONV2D_IM2COL, {"no images": convolution(NO_IMAGES)},
        {"ResNet-50, 3x3": convolution(RESNET_50["3x3"])},
        dtypes=[torch.float32], switch=CUBLAS,
    ),
    "im2col": Operator(
        kernels.im2col, im2col, {name: copies(conv) for name, conv in COLUMNS.items()},
        ("row-major", "channels_last"), {"im2col": (IM2COL_TILES, larger_copies)},
        wrong_inputs.IM2COL,
            {},
        {"3x3": copies(RESNET_50["3x3"])},
    ),
    "col2im": Operator(
        kernels.col2im, fold, {name: sums(conv) for name, conv in COLUMNS.items()},
        ("channels_last", "row-major"), {"col2im": (IM2COL_TILES, larger_sums)},
        wrong_inputs.COL2IM,
            {},
        {"3x3": sums(RESNET_50["3x3"])}, rows=False,
    ),
    "conv2d_relu_pool": Operator(
        kernels.conv2d_relu_pool, conv2d_relu_pool, RELU_POOL,
        ("channels_last", "channels_last", "argument 1", "row-major"),
        {
            # windows x filters, over the patch; quads x channels, over filters; filters x patch,
            # over windows; windows x filters, to scatter
            "conv2d_relu_pool": (RELU_POOL_TILES, lambda tile: pooled(
                (1, tile["BLOCK_K"] // 6 + 1, 4, tile["BLOCK_M"] + 6), tile["BLOCK_N"] + 3, (2, 1)
            )),
            "conv2d_relu_pool_input_grad": (RELU_POOL_GRAD_TILES, lambda tile: pooled(
                (1, tile["BLOCK_N"] + 3, 4, tile["BLOCK_M"] + 6), tile["BLOCK_K"] + 3, (2, 1)
            )),
            "conv2d_relu_pool_weight_grad": (RELU_POOL_GRAD_TILES, lambda tile: pooled(
                (1, tile["BLOCK_N"] // 6 + 1, 4, tile["BLOCK_K"] + 6), tile["BLOCK_M"] + 3, (2, 1)
            )),
            "unpool": (UNPOOL_TILES, lambda tile: pooled(
                (1, 2, 4, 2 * tile["BLOCK_M"] + 6), tile["BLOCK_N"] + 3, (2, 1)
            )),
        },
        wrong_inputs.CONV2D_RELU_POOL,
        {"no images": pooled((0, 3, 7, 8), 5, (3, 3))},
        {"the demo's second block": pooled((512, 16, 13, 13), 32, (3, 3)),
         "CIFAR": pooled((256, 3, 32, 32), 64, (3, 3), 1)},
        switch=CUDNN,
    ),
    "conv2d_stack": Operator(
        kernels.conv2d_stack, conv2d_stack, STACKS,
        ("channels_last", "channels_last", *("argument 1", "row-major", "argument 3", "row-major")),
        {}, {}, {}, dtypes=[torch.float32], switch=CUDNN,
    ),
    "max_pool2d": Operator(
        kernels.max_pool2d, torch.nn.functional.max_pool2d, POOLS, ("channels_last", "argument 0"),
        dict.fromkeys(("max_pool2d", "max_pool2d_backward"), (POOL_TILES, lambda tile: pool(
            (1, tile["BLOCK_N"] + 3, 1, tile["BLOCK_M"] + 5), (1, 3), 1, (0, 1)
        ))),
        wrong_inputs.MAX_POOL2D,
        {str(s): pool(s, 2) for s in [(0, 3, 5, 4)]},
        {"ResNet's first": pool((64, 64, 112, 112), 3, 2, 1),
         "global": pool((128, 2048, 7, 7), (7, 7))},
    ),
    "softmax": Operator(
        kernels.softmax, torch.softmax, SOFTMAX, ("argument 0", "argument 0"),
        dict.fromkeys(("softmax", "softmax_backward"), (
            SOFTMAX_TILES, lambda tile: along(beyond(1, 3)(tile))
        )),
        wrong_inputs.SOFTMAX,
        {f"{s}, {dim}": along(s, dim) for dim in (0, -1)
         for s in [(0,), (0, 5), (5, 0), (0, 0), (2, 3, 0, 4), (2, 0, 3, 4, 5)]},
        {"attention": along((8, 16, 1024, 1024)), "a vocabulary": along((2048, 50_257)),
         "columns": along((4096, 4096), 0)},
        exact=False, terms=16, layouts=2,
    ),
    "cross_entropy": Operator(
        kernels.cross_entropy, cross_entropy, CROSS_ENTROPY, ("row-major", "argument 0"),
        dict.fromkeys(("cross_entropy", "cross_entropy_backward"), (
            CROSS_ENTROPY_TILES, lambda tile: losses(beyond(1, 3)(tile), label_smoothing=0.1)
        )),
        wrong_inputs.CROSS_ENTROPY,
        {f"{s}, {reduction}": losses(s, reduction=reduction)
         for s in [(0, 5), (0, 5, 3), (2, 5, 0)] for reduction in ("none", "mean", "sum")},
        {"ImageNet": losses((4096, 1000)), "GPT-2": losses((8192, 50_257)),
         "segmentation": losses((16, 21, 224, 224))},
        exact=False, terms=64, layouts=2, far=("0",),
    ),
}  # fmt: skip


def arrange(x: Any, layout: str) -> Any:
    """`laid_out`, of what is a tensor with dimensions."""
    if (
        not isinstance(x, torch.Tensor)
        or not x.dim()
        or (x.dim() == 1 and layout == "channels_last")
    ):
        return x
    return laid_out(x, layout)

"""The kernels for TMA: each is right, in every layer and tile, and is chosen where it can be.

One harness for the four of them, and for what two do besides: a max-pool behind the convolution,
and the input gradient through a ReLU. Here they run in the interpreter, or on this machine's GPU.
Nearly all is in small integers, where every sum is exact, and in poison. Each layer has one of the
tiles, dtypes and layouts of its filters, in turns; every tile has the layers that are larger.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.convolutions import Conv, integers
from tests.tools.inputs import DEVICE, double, laid_out, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, conv2d, conv2d_relu_pool, conv2d_tma, matmul, matmul_tma
from tilelab.kernels import conv2d_weight_grad_tma as weight_grad_tma
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.bias_relu import bias_activation_backward
from tilelab.kernels.conv2d import TILES as POINTERS
from tilelab.kernels.conv2d import reference as conv2d_reference
from tilelab.kernels.conv2d_input_grad import conv2d_input_grad, conv2d_input_grad_relu
from tilelab.kernels.conv2d_tma import GROUP_BLOCK, pixel_box
from tilelab.kernels.conv2d_weight_grad import conv2d_weight_bias_grad
from tilelab.kernels.matmul import reference as matmul_reference

HOPPER, AMPERE = Device(90, sms=132), Device(80, sms=108)
HALF = [torch.float16, torch.bfloat16]
LESSONS = {
    name: importlib.import_module(f"tilelab.kernels.{name}")
    for name in ("matmul", "conv2d", "conv2d_input_grad", "conv2d_weight_grad", "conv2d_relu_pool")
}


class Fast(NamedTuple):
    """One kernel for TMA.

    Attributes:
        op: what its tiles are chosen for; a function of the layer where that differs.
        tiles: by the bytes of an element.
        small: a tile for tests of everything else.
        layers: {reason: the sizes of a call}.
        make: (layer, dtype, weight's layout, values) -> the tensors.
        call: (layer, tensors) -> the results.
        want: (layer, tensors) -> what they should be, in float64.
        terms: layer -> of how many terms each result is a sum.
        wide: layers that are larger than a tile, and have a remainder.
        parts: layers whose sum is split, or none.
        tf32: layers for TF32.
        work: (layer, tile) -> tiles and parts, which the programs share out; None if not counted.
        turns: the layers of which that is tested.
        fitted: (layer, tile) -> the tile that this layer can have.
    """

    op: Any
    tiles: dict[int, list[dict]]
    small: dict
    layers: dict
    make: Callable
    call: Callable
    want: Callable
    terms: Callable
    wide: list[str]
    parts: list[str]
    tf32: list[str]
    work: Callable | None
    turns: list[str]
    fitted: Callable = lambda layer, tile: tile


def forced(fast, layer, tile):
    return use_tile(fast.op(layer) if callable(fast.op) else fast.op, fast.fitted(layer, tile))


def run(fast, layer, tile, tensors):
    """The results with this tile, in poison."""
    with forced(fast, layer, tile), poison() as p:
        return fast.call(layer, [t if t is None else p(t) for t in tensors])


def assert_exact(fast, layer, tile, dtype, weight="channels_last"):
    """To the last bit what float64 has, rounded once; and not mostly zeros."""
    tensors = fast.make(layer, dtype, weight, integers)
    got, want = run(fast, layer, tile, tensors), fast.want(layer, tensors)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w.to(g.dtype)), f"{(g != w.to(g.dtype)).sum()} of {g.numel()} differ"
        assert w.count_nonzero() > w.numel() / 16
    return got


def tile_id(tile):
    return "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")


@pytest.fixture
def tf32(monkeypatch):
    """float32 products that may be TF32, without which they are not for these kernels."""
    for lesson in LESSONS.values():
        monkeypatch.setattr(lesson, "dot_precision", lambda dtype, switch: "tf32")


def unaligned(x):
    """A copy that lies as `x` does, but one element further on."""
    buffer = x.new_empty(x.numel() + 8)
    return buffer.as_strided(x.shape, x.stride(), 1).copy_(x)


def launched(device, fn, *args, **options):
    """The names of the kernels that a call would launch, in short.

    A matmul that TMA can load is "matmul_tma", though the model may find a tile through pointers
    faster for it.
    """
    with _launch.record(device) as events:
        fn(*args, **options)
    names, can = [], ()
    for event in events:
        if isinstance(event, _launch.Choice):
            can = event.kernels if event.op == "matmul" else can
            continue
        name = event.kernel.__name__.removesuffix("_kernel")
        if name != "matmul_reduce":  # of a sum in parts
            names.append("matmul_tma" if name == "matmul" and "tma" in can else name)
    return names


# --- matmul ---------------------------------------------------------------------------------------

# M, N, K and how A and B lie: a tile and a remainder of the smaller ones, and of the largest
PRODUCTS = {
    f"{M}x{N}x{K}, {a[:5]} {b[:5]}": (M, N, K, a, b)
    for M, N, K in [(72, 136, 72), (136, 264, 200), (8, 8, 8)]
    for a in ("contiguous", "transposed")
    for b in ("contiguous", "transposed")
} | {
    "one row": (1, 128, 64, "contiguous", "contiguous"),
    "64 steps": (8, 16, 640, "contiguous", "transposed"),
    "5 blocks of rows": (317, 120, 72, "contiguous", "contiguous"),
}  # fmt: skip


def make_product(layer, dtype, weight, values):
    M, N, K, a, b = layer
    return [laid_out(values(M, K, dtype=dtype), a), laid_out(values(K, N, dtype=dtype, seed=1), b),
            values(N, dtype=dtype, seed=2)]  # fmt: skip


def product_work(layer, tile):
    M, N, *_ = layer
    return -(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]) * tile["SPLIT_K"]


# --- the convolution ------------------------------------------------------------------------------

CONVOLUTIONS = {
    # geometry; the number of channels is no multiple of a step's, nor that of filters of a tile's
    "3x3": Conv((2, 72, 9, 10), 136, (3, 3), 1, 1),
    "2x3, no padding": Conv((2, 24, 7, 9), 40, (2, 3)),
    "1x7": Conv((2, 16, 5, 9), 24, (1, 7), padding=(0, 3)),
    "7x1": Conv((2, 16, 9, 5), 24, (7, 1), padding=(3, 0)),
    "5x2, padding (2, 1)": Conv((2, 24, 9, 7), 24, (5, 2), padding=(2, 1)),
    "stride 2": Conv((2, 40, 8, 10), 40, (3, 3), 2, 1),
    "stride 2, its odd rows and columns unread": Conv((2, 24, 9, 11), 24, (2, 2), 2),
    "stride 2, an odd padding of an even filter": Conv((2, 24, 8, 6), 24, (4, 4), 2, 1),
    "stride (2, 1)": Conv((2, 24, 8, 7), 24, (3, 3), (2, 1), 1),
    "stride (1, 2)": Conv((2, 24, 7, 8), 24, (3, 3), (1, 2), 1),
    "stride (3, 2), padding (1, 2)": Conv((2, 24, 9, 8), 24, (3, 3), (3, 2), (1, 2)),
    "stride larger than the filter": Conv((2, 24, 9, 12), 24, (2, 2), 3),
    "padding as large as the image": Conv((2, 24, 3, 4), 24, (3, 3), padding=4),
    "padding larger than the stride": Conv((2, 24, 4, 6), 24, (3, 3), 2, 5),
    "dilation 2": Conv((1, 24, 9, 10), 24, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((1, 24, 7, 9), 24, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "dilation 3, stride 2": Conv((1, 24, 12, 14), 24, (3, 3), 2, 2, 3),
    "dilation (2, 3), stride (4, 3)": Conv((1, 24, 12, 15), 24, (2, 3), (4, 3), (0, 2), (2, 3)),
    "1x1": Conv((2, 24, 5, 7), 40, (1, 1)),
    "1x1, stride 2": Conv((2, 24, 7, 9), 40, (1, 1), 2),
    "1x1, stride 2, padding": Conv((2, 24, 6, 8), 40, (1, 1), 2, 1),
    # images
    "one pixel": Conv((5, 24, 1, 1), 24, (1, 1), padding=1),
    "3x3 of one pixel": Conv((5, 24, 1, 1), 24, (3, 3), padding=1),
    "many images of 2x2": Conv((140, 16, 2, 2), 16, (2, 2), padding=1),
    "a row of 300 pixels": Conv((1, 16, 1, 300), 16, (1, 3), padding=(0, 1)),
    "a column of 300 pixels": Conv((1, 16, 300, 1), 16, (3, 1), padding=(1, 0)),
    # few channels: the first layers of networks
    "7x7, stride 2": Conv((2, 3, 19, 18), 72, (7, 7), 2, 3),
    "11x11, stride 4": Conv((2, 3, 23, 25), 24, (11, 11), 4, 2),
    "3x3 of 3 channels": Conv((2, 3, 8, 9), 24, (3, 3), padding=1),
    "3x3 of 3 channels, stride 2": Conv((2, 3, 9, 9), 24, (3, 3), 2, 1),
    "4x4, stride 4: patches": Conv((2, 3, 12, 17), 24, (4, 4), 4),
    "16x16, stride 16: a transformer's": Conv((1, 3, 32, 48), 24, (16, 16), 16),
    "2x2, stride 3: of every fold a part": Conv((2, 3, 9, 10), 24, (2, 2), 3),
    "3x2 of 5 channels, stride (1, 3)": Conv((2, 5, 9, 11), 24, (3, 2), (1, 3), (0, 1)),
    "5x5 of one channel": Conv((3, 1, 9, 8), 24, (5, 5)),
    "3x3 of 8 channels: not packed": Conv((2, 8, 8, 9), 24, (3, 3), padding=1),
    # groups
    "32 groups of 4": Conv((1, 128, 6, 7), 128, (3, 3), 1, 1, 1, 32),
    "4 groups of 16, stride 2": Conv((2, 64, 8, 6), 64, (3, 3), 2, 1, 1, 4),
    "2 groups of 64": Conv((1, 128, 6, 5), 128, (3, 3), 1, 1, 1, 2),
    "6 groups of 16: not a whole block": Conv((1, 96, 6, 5), 96, (2, 3), 1, 1, 1, 6),
    "2 groups of 8 channels and 128 filters": Conv((1, 16, 6, 5), 256, (3, 3), 1, 1, 1, 2),
    "4 groups of 2 channels and 16 filters": Conv((1, 8, 6, 5), 64, (3, 3), 1, 1, 1, 4),
    "16 channels, two filters each": Conv((2, 16, 6, 7), 32, (3, 3), 1, 1, 1, 16),
    "8 groups of 8 channels, 1x1": Conv((2, 64, 6, 7), 64, (1, 1), 1, 0, 1, 8),
}  # fmt: skip


def few(conv):
    return conv.weight[1] < LESSONS["conv2d"].FEW_CHANNELS


def op_of(conv):
    return "conv2d_grouped" if conv.groups > 1 else "conv2d_flat" if few(conv) else "conv2d"


def make_convolution(conv, dtype, weight, values):
    """x, weight and bias; images of few channels are [N, C, H, W] in memory, as datasets are."""
    x = "contiguous" if conv.x[1] < 8 else "channels_last"
    return [*conv.inputs(dtype, x, weight, values), values(conv.filters, dtype=dtype, seed=2)]


def convolved(conv, tensors):
    y = conv2d(*tensors, *conv.args, "relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    return [y]


def convolution_work(conv, tile):
    N, K, P, Q = conv.y
    n, p, q = pixel_box(N, P, Q, tile["BLOCK_M"])
    return -(-N // n) * -(-P // p) * -(-Q // q) * -(-K // tile["BLOCK_N"]) * tile["SPLIT_K"]


def narrow(conv, tile):
    """Groups want tiles of 64 filters."""
    return tile | dict(BLOCK_N=GROUP_BLOCK, SPLIT_K=1) if conv.groups > 1 else tile


POOLED = {  # x, filters, taps, padding
    "whole windows": ((2, 24, 8, 10), 48, (3, 3), 1),
    "an odd row and column are dropped": ((2, 24, 9, 7), 48, (3, 3), 1),
    "an odd column, no padding": ((3, 40, 8, 9), 80, (3, 3), 0),
    "14x14": ((1, 72, 14, 14), 80, (3, 3), 1),
    "one window": ((19, 16, 2, 2), 16, (3, 3), 1),
    "2x5, padding (0, 2)": ((2, 16, 7, 20), 32, (2, 5), (0, 2)),
    "1x1": ((2, 24, 6, 8), 32, (1, 1), 0),
}


def make_pooled(layer, dtype, weight, values):
    x, filters, taps, padding = layer
    return make_convolution(Conv(x, filters, taps, 1, padding), dtype, weight, values)


def pooled(layer, tensors):
    """y, and the place of each maximum."""
    padding = layer[3]
    pair = list(padding) if isinstance(padding, tuple) else [padding] * 2
    return list(torch.ops.tilelab.conv2d_relu_pool(*tensors, pair))


def pooled_reference(layer, tensors):
    """Of equal values the first counts; where none is positive there is no place: 4."""
    x, weight, bias = double(*tensors)
    z = torch.nn.functional.conv2d(x, weight, bias, padding=layer[3])
    P, Q = (size // 2 for size in z.shape[2:])
    four = z[:, :, : 2 * P, : 2 * Q].unflatten(2, (P, 2)).unflatten(4, (Q, 2))
    four = four.permute(0, 1, 2, 4, 3, 5).flatten(4)
    best = four.amax(4)
    first = (four == best[..., None]).to(torch.uint8).argmax(4)
    return [best.relu(), torch.where(best > 0, first, 4).double()]


# --- the input gradient ---------------------------------------------------------------------------

INPUT_GRADIENTS = {
    # neither channels nor filters are a multiple of a tile's
    "3x3": Conv((2, 72, 7, 10), 72, (3, 3), 1, 1),
    "3x3, 8 channels": Conv((2, 8, 9, 10), 24, (3, 3), 1, 1),
    "136 channels": Conv((2, 136, 7, 10), 24, (2, 2), 1, 1),
    "2x3, no padding": Conv((2, 24, 7, 9), 40, (2, 3)),
    "1x7": Conv((2, 24, 5, 9), 24, (1, 7), padding=(0, 3)),
    "5x2, padding (2, 1)": Conv((2, 24, 9, 7), 24, (5, 2), padding=(2, 1)),
    "padding as large as the image": Conv((2, 24, 3, 4), 24, (3, 3), padding=4),
    "dilation 2": Conv((1, 24, 9, 10), 24, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((1, 24, 7, 9), 24, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "1x1, padding": Conv((2, 24, 5, 7), 40, (1, 1), padding=1),
    # strides: the last two blocks of channels have some in common
    "stride 2": Conv((3, 72, 6, 10), 24, (3, 3), 2, 1),
    "stride 2, 136 channels": Conv((1, 136, 6, 4), 40, (3, 3), 2, 1),
    "stride 2, a row and a column unread": Conv((2, 64, 6, 8), 24, (3, 3), 2),
    "stride 2 of 1x1: three classes without a tap": Conv((2, 72, 6, 8), 40, (1, 1), 2),
    "stride 2 of 1x1, padding": Conv((2, 64, 6, 8), 40, (1, 1), 2, 1),
    "stride 2 of 2x2: a tap each": Conv((2, 64, 6, 8), 24, (2, 2), 2),
    "stride 2 of 7x7": Conv((1, 64, 6, 8), 8, (7, 7), 2, 3),
    "stride 2 of 4x4": Conv((2, 64, 8, 6), 24, (4, 4), 2, 1),
    "stride (2, 1), few channels": Conv((2, 24, 8, 7), 24, (3, 3), (2, 1), 1),
    "stride (1, 2)": Conv((2, 72, 7, 8), 24, (3, 3), (1, 2), 1),
    "stride (3, 2), padding (1, 2)": Conv((2, 64, 9, 8), 24, (4, 3), (3, 2), (1, 2)),
    "stride larger than the filter": Conv((2, 64, 9, 12), 24, (2, 2), 3),
    "padding larger than the stride": Conv((2, 64, 4, 6), 24, (3, 3), 2, 5),
    "dilation 2, stride 2: classes without a tap": Conv((1, 64, 8, 10), 24, (3, 3), 2, 2, 2),
    "dilation 3, stride 2": Conv((1, 64, 12, 14), 24, (3, 3), 2, 2, 3),
    "dilation (2, 3), stride (4, 3)": Conv((1, 64, 12, 15), 24, (2, 3), (4, 3), (0, 2), (2, 3)),
    "dilation (6, 1), stride (4, 2): gcd 2": Conv((1, 64, 12, 4), 24, (3, 2), (4, 2), 2, (6, 1)),
    # images
    "3x3 of one pixel": Conv((5, 24, 1, 1), 24, (3, 3), padding=1),
    "many images of 2x2": Conv((140, 16, 2, 2), 16, (2, 2), padding=1),
    "a row of 300 pixels": Conv((1, 16, 1, 300), 16, (1, 3), padding=(0, 1)),
    "many images, stride 2": Conv((70, 64, 2, 4), 8, (3, 3), 2, 1),
}  # fmt: skip
STEMS = {  # few channels: by the folded image, which may be smaller than the padded one, or larger
    "stem of 7x7": Conv((2, 3, 14, 18), 24, (7, 7), 2, 3),
    "stem of 3x3, 1 channel": Conv((2, 1, 7, 9), 16, (3, 3), 1, 1),
    "stem of 11x11, rows unread": Conv((1, 3, 30, 27), 24, (11, 11), 4, 2),
    "patches": Conv((2, 3, 17, 16), 24, (8, 8), 8),
    "stride (3, 2) larger than the filter": Conv((2, 5, 11, 9), 8, (2, 1), (3, 2), (0, 1)),
}


def make_input_gradient(conv, dtype, weight, values):
    """dy, weight, and an x of which about as much is positive, negative and zero."""
    x, w = conv.inputs(dtype, "channels_last", weight, values)
    return [conv.dy(dtype, "channels_last", values), w, x]


def input_gradient(conv, tensors):
    dx = conv2d_input_grad(*tensors[:2], list(conv.x), *conv.lists)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    return [dx]


def input_gradient64(conv, tensors):
    """dx by autograd of torch's own convolution."""
    dy, weight, _ = tensors
    x = torch.zeros(conv.x, dtype=torch.float64, device=dy.device, requires_grad=True)
    y = torch.nn.functional.conv2d(x, double(weight), None, *conv.args)
    return list(torch.autograd.grad(y, x, double(dy)))


def through_relu(conv, tensors):
    """dz and dbias."""
    dz, dbias = conv2d_input_grad_relu(*tensors, *conv.lists)
    assert dz.stride() == tensors[2].stride()
    return [dz, dbias]


def through_relu64(conv, tensors):
    (dx,), x = input_gradient64(conv, tensors), tensors[2]
    dz = torch.where(double(x) <= 0, 0.0, dx)
    return [dz, dz.sum((0, 2, 3))]


def input_gradient_work(conv, tile):
    (N, C, H, W), (a, b) = conv.x, conv.lists[0]
    n, p, q = pixel_box(N, H // a, W // b, tile["BLOCK_M"])
    boxes = -(-N // n) * -(-H // a // p) * -(-W // b // q)
    return boxes * -(-C // tile["BLOCK_N"]) * tile["SPLIT_K"] * a * b


# --- the weight gradient --------------------------------------------------------------------------

WEIGHT_GRADIENTS = {
    # geometry; of no tile's size the batch, the channels or the filters are a multiple
    "3x3": Conv((33, 72, 2, 3), 40, (3, 3), 1, 1),
    "3x3 of a whole tile": Conv((32, 64, 3, 3), 64, (3, 3), 1, 1),
    "two blocks of filters and of channels": Conv((17, 264, 2, 2), 136, (1, 2)),
    "2x3, no padding": Conv((17, 64, 4, 5), 24, (2, 3)),
    "1x7": Conv((16, 16, 2, 9), 24, (1, 7), padding=(0, 3)),
    "7x1": Conv((16, 16, 9, 2), 24, (7, 1), padding=(3, 0)),
    "5x2, padding (2, 1)": Conv((16, 24, 5, 4), 24, (5, 2), padding=(2, 1)),
    "stride 2": Conv((20, 40, 6, 4), 40, (3, 3), 2, 1),
    "stride 2, an odd image": Conv((20, 24, 5, 7), 24, (3, 3), 2, 1),
    "stride (1, 2)": Conv((16, 24, 4, 6), 24, (3, 3), (1, 2), 1),
    "stride (3, 2), padding (1, 2)": Conv((16, 24, 7, 6), 24, (3, 3), (3, 2), (1, 2)),
    "stride larger than the filter": Conv((16, 64, 7, 9), 24, (2, 2), 3),
    "padding larger than the filter": Conv((16, 24, 2, 3), 24, (2, 2), padding=3),
    "padding larger than the image, stride 2": Conv((16, 24, 3, 2), 24, (3, 3), 2, 3),
    "taps that are never inside": Conv((16, 24, 1, 2), 24, (3, 5), padding=(1, 2)),
    "dilation 2": Conv((16, 24, 5, 4), 24, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((16, 24, 4, 7), 24, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "dilation (2, 3), stride (4, 3)": Conv((16, 24, 9, 9), 24, (2, 3), (4, 3), (0, 2), (2, 3)),
    "1x1": Conv((3, 72, 5, 7), 40, (1, 1)),
    "1x1, stride 2": Conv((17, 24, 4, 5), 40, (1, 1), 2),
    "1x1, stride 2, padding": Conv((17, 24, 3, 4), 40, (1, 1), 2, 1),
    "3x3 of one pixel": Conv((40, 24, 1, 1), 24, (3, 3), padding=1),
    # windows: few channels and no padding
    "16 channels": Conv((20, 16, 5, 6), 32, (3, 3)),
    "16 channels, stride 2, dilation (2, 1)": Conv((16, 16, 8, 7), 32, (3, 3), 2, 0, (2, 1)),
    "56 channels: three windows of 168": Conv((16, 56, 4, 4), 32, (3, 3)),
    "8 channels of one column": Conv((16, 8, 5, 3), 24, (3, 1)),
    "24 channels, dilation (1, 2): no windows": Conv((16, 24, 4, 6), 24, (2, 2), 1, 0, (1, 2)),
    # pixels side by side are columns: few channels, and padding
    "16 channels, padding 1": Conv((17, 16, 4, 5), 24, (3, 3), 1, 1),
    "16 channels, stride (2, 1), dilation (3, 1)": Conv(
        (16, 16, 8, 3), 24, (2, 3), (2, 1), (1, 2), (3, 1)
    ),
    # few channels: packed
    "7x7, stride 2": Conv((16, 3, 9, 8), 72, (7, 7), 2, 3),
    "3x3 of 3 channels": Conv((17, 3, 4, 5), 24, (3, 3), padding=1),
    "3x2 of 5 channels, stride (1, 3)": Conv((16, 5, 4, 7), 24, (3, 2), (1, 3), (0, 1)),
    "4x4, stride 4: patches, each a pixel": Conv((5, 3, 8, 9), 24, (4, 4), 4),
    "5x5 of one channel": Conv((16, 1, 6, 7), 24, (5, 5)),
}  # fmt: skip

NEIGHBOURS = {  # layers, tiles whose columns are a row of taps, and pixels of dy of their rows
    "64 channels": (Conv((32, 64, 3, 4), 64, (3, 3), 1, 1), "128x256x32", 2),
    "33 images": (Conv((33, 64, 2, 4), 64, (3, 3), 1, 1), "128x256x64", 2),
    "an odd row": (Conv((17, 64, 2, 5), 64, (3, 3), 1, 1), "128x256x32", 1),
    "two taps": (Conv((16, 64, 2, 3), 64, (2, 2)), "128x256x32", 2),
    "four taps": (Conv((16, 64, 2, 5), 64, (1, 4), 1, (0, 1)), "128x256x32", 1),
    "images of one pixel": (Conv((16, 64, 1, 1), 64, (3, 2), 1, 1), "128x256x32", 2),
    "padding larger than the filter": (Conv((16, 64, 2, 1), 64, (3, 3), 1, 4), "128x256x32", 1),
    "and two pixels of dy": (Conv((16, 64, 2, 2), 64, (3, 3), 1, 4), "128x256x32", 2),
    "stride (2, 1)": (Conv((16, 64, 5, 4), 64, (3, 3), (2, 1), 1), "128x256x32", 2),
    "128 filters": (Conv((16, 64, 2, 4), 128, (3, 3), 1, 1), "128x256x32", 1),
    "136 filters": (Conv((16, 64, 2, 3), 136, (3, 3), 1, 1), "64x256x32", 1),
    "40 filters": (Conv((16, 64, 2, 4), 40, (3, 3), 1, 1), "128x256x32", 1),
    "72 channels": (Conv((16, 72, 2, 3), 64, (3, 3), 1, 1), "128x256x32", 1),
    "32 channels": (Conv((16, 32, 2, 4), 64, (3, 3), 1, 1), "128x128x32", 2),
    "32 filters": (Conv((16, 64, 2, 4), 32, (2, 3), 1, 1), "64x256x32", 2),
    "five taps": (Conv((16, 24, 2, 5), 24, (2, 5), 1, (0, 2)), "64x128x32", 1),
}  # fmt: skip


def make_weight_gradient(conv, dtype, weight, values):
    """x, dy and the weight; images of few channels are [N, C, H, W] in memory, as datasets are."""
    x, w = conv.inputs(dtype, "contiguous" if conv.x[1] < 8 else "channels_last", weight, values)
    return [x, conv.dy(dtype, "channels_last", values), w]


def weight_gradient(conv, tensors):
    """dweight and dbias."""
    got = conv2d_weight_bias_grad(*tensors, *conv.lists)
    assert got[0].stride() == torch.empty_like(tensors[2]).stride()
    return list(got)


def weight_gradient64(conv, tensors):
    x, dy, weight = tensors
    w = weight.detach().double().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), w, None, *conv.args)
    return [*torch.autograd.grad(y, [w], dy.double()), dy.double().sum((0, 2, 3))]


TILE = {tile_id(tile): tile for tile in weight_grad_tma.FAST_TILES[2]}
MATMUL_TILES = matmul_tma.FAST_TILES
CONV2D_TILES = conv2d_tma.FAST_TILES
GEMM_SMALL = MATMUL_TILES[2][0] | dict(BLOCK_M=64, BLOCK_N=128, num_warps=4)
SMALL = CONV2D_TILES[2][3]  # 128 pixels, 64 filters
UNGROUPED = [name for name, conv in CONVOLUTIONS.items() if conv.groups == 1]

KERNELS = {
    "matmul": Fast(
        "matmul", MATMUL_TILES, GEMM_SMALL, PRODUCTS, make_product,
        lambda layer, tensors: [matmul(*tensors, "relu")],
        lambda layer, tensors: [matmul_reference(*double(*tensors), "relu")],
        lambda layer: [layer[2] + 1],
        [name for name in PRODUCTS if name.startswith("136")],
        ["64 steps", "72x136x72, conti trans", "8x8x8, trans conti"],
        ["72x136x72, conti trans"], product_work, ["5 blocks of rows", "8x8x8, conti conti"],
        lambda layer, tile: tile | dict(SPLIT_K=1) if tile["kernel"] == "tma_ws" else tile,
    ),
    "conv2d": Fast(
        op_of, CONV2D_TILES, SMALL, CONVOLUTIONS, make_convolution, convolved,
        lambda conv, tensors: [conv2d_reference(*double(*tensors), *conv.args, "relu")],
        lambda conv: [conv.terms["y"]],
        ["3x3", "2 groups of 64"], UNGROUPED,
        [name for i, name in enumerate(UNGROUPED) if i % 3 == 0 and "3x2" not in name],
        convolution_work, ["3x3", "one pixel"], narrow,
    ),
    "conv2d_relu_pool": Fast(
        "conv2d_relu_pool", CONV2D_TILES, SMALL, POOLED, make_pooled, pooled, pooled_reference,
        lambda layer: [layer[0][1] * layer[2][0] * layer[2][1] + 1, 1],
        ["14x14"], [], ["whole windows", "an odd column, no padding"], None, [],
    ),
    "conv2d_input_grad": Fast(
        "conv2d_input_grad", CONV2D_TILES, SMALL, INPUT_GRADIENTS | STEMS, make_input_gradient,
        input_gradient, input_gradient64, lambda conv: [conv.terms["dx"]],
        ["stride 2", "136 channels"],
        ["2x3, no padding", "3x3 of one pixel", "stride 2", "stride 2 of 7x7", *STEMS]
        + ["stride 2 of 1x1: three classes without a tap"],
        ["2x3, no padding", "stride 2", "1x1, padding"], input_gradient_work,
        ["136 channels", "stride 2, 136 channels", "1x1, padding"],
    ),
    "conv2d_input_grad_relu": Fast(
        "conv2d_input_grad_relu", CONV2D_TILES, SMALL, INPUT_GRADIENTS, make_input_gradient,
        through_relu, through_relu64, lambda conv: [conv.terms["dx"]] * 2,
        ["stride 2", "136 channels"], [], ["2x3, no padding", "stride 2", "1x1, padding"],
        input_gradient_work, ["136 channels", "stride 2, 136 channels"],
    ),
    "conv2d_weight_grad": Fast(
        "conv2d_weight_grad", weight_grad_tma.FAST_TILES, TILE["64x64x32"], WEIGHT_GRADIENTS,
        make_weight_gradient, weight_gradient, weight_gradient64,
        lambda conv: [conv.terms["dw"], conv.terms["db"]],
        ["two blocks of filters and of channels", "16 channels", "stride 2, an odd image"],
        list(WEIGHT_GRADIENTS), [], lambda conv, tile: (6 + 1) * tile["SPLIT_K"],
        ["2x3, no padding"],
    ),
}  # fmt: skip


# --- the same results -----------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "name, layer", [(name, layer) for name, fast in KERNELS.items() for layer in fast.layers]
)
def test_every_layer(name, layer):
    """In one of the tiles and dtypes; every second time the filters have to be packed."""
    fast = KERNELS[name]
    i = list(fast.layers).index(layer)
    tiles = fast.tiles[2]
    weight = ("channels_last", "contiguous")[i % 2]
    assert_exact(fast, fast.layers[layer], tiles[i % len(tiles)], HALF[i // 2 % 2], weight)


@pytest.mark.core
@pytest.mark.parametrize(
    "name, tile",
    [
        pytest.param(name, tile, id=f"{name} {tile_id(tile)} {i}")
        for name, fast in KERNELS.items() for i, tile in enumerate(fast.tiles[2])
    ],
)  # fmt: skip
def test_every_tile(name, tile):
    """More than a tile, in whole sums and in two parts of them."""
    fast = KERNELS[name]
    large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128 and name != "conv2d_weight_grad"
    for i, layer in enumerate(fast.wide):
        split = 2 if fast.parts and i % 2 and not large else 1
        assert_exact(fast, fast.layers[layer], tile | dict(SPLIT_K=split), HALF[i % 2])


@pytest.mark.core
@pytest.mark.parametrize(
    "name, layer, number",
    [(name, layer, i) for name, fast in KERNELS.items() for j, layer in enumerate(fast.tf32)
     for i in range(len(fast.tiles.get(4, []))) if len(fast.tf32) < 4 or i == j % 3],
)  # fmt: skip
def test_tf32_tiles(name, layer, number, tf32):
    """Of float32 a step of TMA is four elements."""
    fast = KERNELS[name]
    assert_exact(fast, fast.layers[layer], fast.tiles[4][number], torch.float32)


@pytest.mark.core
@pytest.mark.parametrize(
    "name, layer", [(name, layer) for name, fast in KERNELS.items() for layer in fast.parts]
)
def test_parts_of_the_sum(name, layer):
    """Parts that divide nothing, begin within a tap, and some that are left with nothing to add."""
    fast = KERNELS[name]
    i = fast.parts.index(layer)
    splits = (2, 3, 16) if len(fast.parts) < 4 else (3, 16) if i % 4 == 0 else ((2, 3)[i % 2],)
    for split in splits:
        tile = fast.small | dict(SPLIT_K=split)
        if name == "conv2d_input_grad":
            tile = tile | dict(BLOCK_K=16)
        assert_exact(fast, fast.layers[layer], tile, HALF[split % 2], "contiguous")


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("per_sm", [0, 1, 2])
@pytest.mark.parametrize(
    "name, layer", [(name, layer) for name, fast in KERNELS.items() for layer in fast.turns]
)
def test_every_program_does_its_share(name, layer, per_sm, split):
    """One program a tile, or a few that take turns, there and back: each tile is computed."""
    fast = KERNELS[name]
    if split > 1 and not fast.parts:
        pytest.skip("its sum is not split")
    tile, sizes = fast.small | dict(PROGRAMS_PER_SM=per_sm, SPLIT_K=split), fast.layers[layer]
    if split == 1 or per_sm == 1:
        assert_exact(fast, sizes, tile, torch.float16)
    tensors = fast.make(sizes, torch.float16, "channels_last", integers)
    with forced(fast, sizes, tile), _launch.record(Device(90, sms=2)) as events:
        fast.call(sizes, tensors)
    (grid,) = [e.grid for e in events if isinstance(e, _launch.Launch)
               and e.kernel.__name__.endswith("_tma_kernel")]  # fmt: skip
    work = fast.work(sizes, tile)
    assert grid == (min(work, 2 * per_sm) if per_sm else work,)


@pytest.mark.parametrize("GROUP_M", [1, 2, 8])
@pytest.mark.parametrize("blocks", [(5, 1), (1, 3), (3, 2)], ids=str)
def test_every_grouping_of_matmul_visits_every_tile(blocks, GROUP_M):
    layer = 64 * blocks[0] - 3, 128 * blocks[1] - 8, 72, "contiguous", "contiguous"
    tile = GEMM_SMALL | dict(PROGRAMS_PER_SM=1, GROUP_M=GROUP_M)
    assert_exact(KERNELS["matmul"], layer, tile, torch.float16)


@pytest.mark.core
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", KERNELS)
def test_against_float64(name, dtype):
    """Numbers that are not exact; and the same bits twice, in parts too."""
    fast = KERNELS[name]
    sizes = fast.layers[fast.wide[0]]
    tensors = fast.make(sizes, dtype, "channels_last", randn)
    want = fast.want(sizes, tensors)
    for split in (1, 2) if fast.parts else (1,):
        tile = fast.small | dict(SPLIT_K=split)
        got, again = (run(fast, sizes, tile, tensors) for _ in range(2))
        for g, g2, w, terms in zip(got, again, want, fast.terms(sizes), strict=True):
            assert torch.equal(g, g2)
            if g.is_floating_point():
                assert_close(g, w, dtype=dtype, terms=terms)


@pytest.mark.core
@pytest.mark.parametrize("conv, tile, pixels", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_columns_of_the_weight_gradient(conv, tile, pixels):
    tensors = make_weight_gradient(conv, torch.bfloat16, "channels_last", integers)
    with use_tile("conv2d_weight_grad", TILE[tile]), _launch.record(HOPPER) as events:
        weight_gradient(conv, tensors)
    meta = next(e.meta for e in events if isinstance(e, _launch.Launch))
    seen = meta["DY_PIXELS"], meta["X_STEP"], meta["X_FIRST"]
    assert seen == (pixels, pixels * conv.x[1], -conv.lists[1][1] * conv.x[1])
    fast = KERNELS["conv2d_weight_grad"]
    assert_exact(fast, conv, TILE[tile], torch.bfloat16, "contiguous")
    assert_exact(fast, conv, TILE[tile] | dict(SPLIT_K=3), torch.float16)


@pytest.mark.parametrize("where", ["x", "dy"])
def test_neighbours_in_slices_of_tensors(where):
    """Pixels with other channels between them are no columns of x; of dy they are no pairs."""
    conv, _, _ = NEIGHBOURS["64 channels"]
    x, dy, weight = make_weight_gradient(conv, torch.bfloat16, "channels_last", integers)
    wide = torch.cat([x, x] if where == "x" else [dy, dy], 1)
    wide = wide.contiguous(memory_format=torch.channels_last)[:, :64]
    tensors = [wide, dy, weight] if where == "x" else [x, wide, weight]
    with use_tile("conv2d_weight_grad", TILE["128x256x32"]):
        with _launch.record(HOPPER) as events:
            weight_gradient(conv, tensors)
        got = weight_gradient(conv, tensors)
    meta = next(e.meta for e in events if isinstance(e, _launch.Launch))
    assert (meta["DY_PIXELS"], meta["X_STEP"]) == (1, 0 if where == "x" else 64)
    for g, w in zip(got, weight_gradient64(conv, tensors), strict=True):
        assert torch.equal(g, w.to(torch.bfloat16))


def test_partial_results_of_the_weight_gradient_are_float32():
    """16-bit ones would each be rounded: parts of half an ulp are lost, or they are not."""
    conv = Conv((128, 8, 1, 1), 8, (1, 1))
    x = torch.ones(conv.x, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros_like(x)
    dy[0], dy[1], dy[64], dy[65] = 1, 2**-8, 2**-9, 2**-9  # ulp of 1: 2^-7
    got = run(KERNELS["conv2d_weight_grad"], conv, TILE["64x64x32"] | dict(SPLIT_K=2),
              [x, dy, x[:8]])  # fmt: skip
    assert all((t == 1 + 2**-7).all() for t in got)


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_of_matmul(value, activation):
    a, b = randn(72, 72, dtype=torch.float16), randn(72, 136, dtype=torch.float16, seed=1)
    a[70, 71] = value  # in the rows and the step that are not whole
    with use_tile("matmul", GEMM_SMALL):
        c = matmul(a, b, None, activation)
    want = matmul_reference(*double(a, b), None, activation)
    torch.testing.assert_close(c.double(), want, equal_nan=True, atol=0.1, rtol=0.01)


# Where a packed zero meets what is not finite: 0 * inf is NaN.
LEAKS = ["stride 2", "7x7, stride 2", "3x3 of 3 channels, stride 2", "32 groups of 4"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "layer",
    ["3x3", "2x3, no padding", "1x1", "padding as large as the image", "dilation 2", "one pixel"]
    + ["3x3 of 8 channels: not packed", "2 groups of 64", *LEAKS],
)
def test_nan_and_infinity_of_the_convolution(layer, value):
    """To the last output; and where there are packed zeros, to those beside it at most."""
    conv = CONVOLUTIONS[layer]
    inputs = make_convolution(conv, torch.float16, "channels_last", randn)
    inputs[0][0, 1, -1, -1] = value
    with forced(KERNELS["conv2d"], conv, SMALL):
        y = conv2d(*inputs, *conv.args).double()
    want = conv2d_reference(*double(*inputs), *conv.args)
    bad = ~want.isfinite()
    if layer in LEAKS:
        near = bad.any(dim=1, keepdim=True).double()
        near = torch.nn.functional.max_pool2d(near, 3, 1, 1).bool().expand_as(want)
        leaked = y.isnan() & ~bad
        assert not (leaked & ~near).any()
        y = torch.where(leaked, want, y)
        # an infinity that a packed zero has met as well
        y = torch.where(y.isnan() & bad, want, y)
    assert bad.any()
    torch.testing.assert_close(y, want, equal_nan=True, atol=0.1, rtol=0.01)


@pytest.mark.parametrize("at", range(4))
def test_a_pooled_nan_wins_wherever_it_is(at):
    layer = POOLED["1x1"]
    inputs = make_pooled(layer, torch.float16, "channels_last", integers)
    inputs[0][1, 3, 2 + at // 2, 4 + at % 2] = torch.nan
    with use_tile("conv2d_relu_pool", SMALL):
        y, place = pooled(layer, inputs)
    want = LESSONS["conv2d_relu_pool"].reference(*double(*inputs), layer[3])
    torch.testing.assert_close(y.double(), want, rtol=0, atol=0, equal_nan=True)
    assert y[1, :, 1, 2].isnan().all() and (place[1, :, 1, 2] == at).all()
    assert y.isnan().sum() == layer[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("layer", ["3x3, 8 channels", "stride 2", "1x1, padding", "dilation 2"])
def test_nan_and_infinity_of_the_input_gradient(layer, value):
    conv = INPUT_GRADIENTS[layer]
    dy, w, x = make_input_gradient(conv, torch.float16, "channels_last", randn)
    dy[0, 1, 1, 2] = value
    (want,) = input_gradient64(conv, [dy, w, x])
    assert 0 < want.isfinite().sum() < want.numel()
    with use_tile("conv2d_input_grad", SMALL):
        dx = conv2d_input_grad(dy, w, list(conv.x), *conv.lists)
    torch.testing.assert_close(dx.double(), want, equal_nan=True, atol=0.1, rtol=0.01)
    x[0, 2, -1, -1] = torch.nan  # of which one cannot say that it was cut off
    with use_tile("conv2d_input_grad_relu", SMALL):
        dz, dbias = conv2d_input_grad_relu(dy, w, x, *conv.lists)
    want = bias_activation_backward(dx, x, None, "relu")
    assert torch.equal(dz.nan_to_num(), want[0].nan_to_num())
    assert torch.equal(dbias.isfinite(), want[1].isfinite()) and not dbias.isfinite().all()
    assert torch.equal(dz[0, 2, -1, -1].nan_to_num(), dx[0, 2, -1, -1].nan_to_num())


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize(
    "layer",
    ["stride 2, an odd image", "16 channels", "16 channels, padding 1", "7x7, stride 2"],
)
def test_nan_and_infinity_of_the_weight_gradient(layer, where, value):
    """In a corner of the last image; and of dy not to taps that are in the padding there.

    torch multiplies those with zeros, and so makes NaN of them; here they are left out, but for an
    image that is packed with its padding, and to the left and right where pixels are columns.
    """
    conv = WEIGHT_GRADIENTS[layer]
    inputs = make_weight_gradient(conv, torch.float16, "channels_last", randn)
    want = weight_gradient64(conv, inputs)[0]
    bad = inputs[0 if where == "x" else 1]
    bad[-1, -1, 0, 0] = value
    wrong = weight_gradient64(conv, inputs)[0]
    reads = torch.ones_like(wrong, dtype=torch.bool)
    if where == "dy" and conv.x[1] >= 8:
        pad, dil = conv.lists[1], conv.lists[2]
        columns = layer == "16 channels, padding 1"
        for dim in (0,) if columns else (0, 1):
            taps = torch.arange(conv.taps[dim]) * dil[dim] - pad[dim]
            reads &= (taps >= 0).view((-1, 1) if dim == 0 else (1, -1)).to(reads.device)
    want = torch.where(reads, wrong, want)
    assert 0 < want.isfinite().sum() < want.numel()
    with use_tile("conv2d_weight_grad", TILE["64x64x32"]):
        got = weight_gradient(conv, inputs)[0]
    assert_close(got, want, dtype=torch.float16, terms=conv.terms["dw"])


# --- anything else --------------------------------------------------------------------------------


@st.composite
def any_layer(draw):
    """A kernel, and sizes that it can do: few pixels, for the interpreter."""
    name = draw(st.sampled_from(list(KERNELS)))
    eights = st.sampled_from([8, 24, 64, 72])
    if name == "matmul":
        K, N = 8 * draw(st.integers(1, 30)), 8 * draw(st.integers(1, 20))
        transposed = [draw(st.sampled_from(["contiguous", "transposed"])) for _ in "ab"]
        M = draw(st.integers(1, 100))
        return name, (8 * M if transposed[0] == "transposed" else M, N, K, *transposed)
    groups, taps_max = 1, 3 if name == "conv2d_weight_grad" else 4
    whole = name != "conv2d_weight_grad"  # groups of rows, so that none is odd
    sides = []
    for _ in range(2):
        taps, stride = draw(st.integers(1, taps_max)), draw(st.integers(1, 3))
        pad, dilation = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        least = max(1, dilation * (taps - 1) + 1 - 2 * pad)
        size = draw(st.integers(least, least + (3 if name == "conv2d_weight_grad" else 7)))
        sides.append((-(-size // stride) * stride if whole else size, taps, stride, pad, dilation))
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    N, C, K = draw(st.integers(1, 3)), draw(eights), draw(eights)
    if name == "conv2d_relu_pool":
        size = [max(n, r + 1 - 2 * p) for n, r, p in zip(size, taps, padding, strict=True)]
        return name, ((N, C, *size), draw(st.sampled_from([16, 48, 80])), taps, padding)
    if name == "conv2d":
        groups = draw(st.sampled_from([1, 1, 2, 4]))
    if groups > 1:
        C, K = draw(st.sampled_from([8, 24])) * groups, draw(st.sampled_from([8, 16, 64])) * groups
    elif "relu" not in name and draw(st.booleans()):
        C, dilation = draw(st.integers(1, 7)), (1, 1)
        size = [max(n, taps[i] - 2 * padding[i]) for i, n in enumerate(size)]
    if "input_grad" in name and C >= 8:
        C = draw(st.sampled_from([64, 72])) if stride[1] > 1 else C
        # without a stride and padding that is a matmul
        hypothesis.assume(taps != (1, 1) or stride != (1, 1) or padding != (0, 0))
    N = draw(st.integers(16, 40)) if name == "conv2d_weight_grad" else N
    return name, Conv((N, C, *size), K, taps, stride, padding, dilation, groups)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    layer=any_layer(), dtype=st.sampled_from(HALF), number=st.integers(0, 99),
    split=st.integers(1, 4), weight=st.sampled_from(["channels_last", "contiguous", "sliced"]),
)  # fmt: skip
def test_any_layer(layer, dtype, number, split, weight):
    name, sizes = layer
    fast = KERNELS[name]
    tile = fast.tiles[2][number % len(fast.tiles[2])]
    large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128 and name != "conv2d_weight_grad"
    tile = tile | dict(SPLIT_K=split if fast.parts and not large else 1)
    tensors = fast.make(sizes, dtype, weight, integers)
    for g, w in zip(run(fast, sizes, tile, tensors), fast.want(sizes, tensors), strict=True):
        assert torch.equal(g, w.to(g.dtype))


# --- which kernel ---------------------------------------------------------------------------------


def half(*shape):
    return randn(*shape, dtype=torch.bfloat16)


PRODUCT_BORDERS = {  # operands, and the kernel that a Hopper GPU takes for them
    "aligned rows": (lambda: (half(64, 64), half(64, 128)), "tma"),
    "fp16": (lambda: (half(64, 64).half(), half(64, 128).half()), "tma"),
    "both transposed": (lambda: (half(64, 72).t(), half(128, 64).t()), "tma"),
    "an odd number of rows": (lambda: (half(37, 64), half(64, 128)), "tma"),
    "one row": (lambda: (half(1, 64), half(64, 128)), "tma"),
    "a column slice at a multiple of 8": (lambda: (half(64, 96)[:, 16:80], half(64, 128)), "tma"),
    "every second row": (lambda: (half(128, 64)[::2], half(64, 128)), "tma"),
    "N = 8": (lambda: (half(64, 64), half(64, 8)), "tma"),
    "N no multiple of 8": (lambda: (half(64, 64), half(64, 100)), "pointer"),
    "N no multiple of 8, B transposed": (lambda: (half(64, 64), half(100, 64).t()), "pointer"),
    "K no multiple of 8": (lambda: (half(64, 60), half(60, 128)), "pointer"),
    "K no multiple of 8, A transposed": (lambda: (half(60, 64).t(), half(60, 128)), "tma"),
    "M no multiple of 8, A transposed": (lambda: (half(64, 60).t(), half(64, 128)), "pointer"),
    "A off by one element": (lambda: (half(64, 72)[:, 1:65], half(64, 128)), "pointer"),
    "B off by four elements": (lambda: (half(64, 64), half(64, 136)[:, 4:132]), "pointer"),
    "no dimension contiguous": (lambda: (half(64, 128)[:, ::2], half(64, 128)), "pointer"),
    "rows of stride 0": (lambda: (half(1, 64).expand(64, 64), half(64, 128)), "pointer"),
    "rows that overlap": (lambda: (half(600).unfold(0, 64, 16), half(64, 8)), "pointer"),
    "no rows": (lambda: (half(0, 64), half(64, 128)), None),
    "no columns": (lambda: (half(64, 64), half(64, 0)), None),
    "nothing to add": (lambda: (half(64, 0), half(0, 128)), "pointer"),
    "float32 as IEEE has it": (lambda: (randn(64, 64), randn(128, 64).t()), "pointer"),
}  # fmt: skip


def product_kernel(a, b, device):
    """The kind of the kernel that a call would launch; None for no launch."""
    names = launched(device, matmul, a, b)
    return {"matmul": "pointer", "matmul_tma": "tma"}[names[0]] if names else None


@pytest.mark.parametrize("operands, kernel", PRODUCT_BORDERS.values(), ids=PRODUCT_BORDERS)
def test_borders_of_matmul(operands, kernel):
    a, b = operands()
    assert product_kernel(a, b, HOPPER) == kernel
    if kernel is not None:
        assert product_kernel(a, b, AMPERE) == "pointer"
    if kernel == "tma":
        with use_tile("matmul", GEMM_SMALL):
            c = matmul(a, b)
    else:
        with use_tile("matmul", GEMM_SMALL), pytest.raises(ValueError, match="cannot take these"):
            matmul(a, b)
        c = matmul(a, b)
    want = matmul_reference(*double(a, b))
    assert c.shape == want.shape
    torch.testing.assert_close(c.double(), want, atol=0.3, rtol=0.02)


def test_tf32_matmul_takes_it_for_operands_along_k_alone(tf32):
    a, b = randn(64, 64), randn(128, 64, seed=1)
    assert product_kernel(a, b.t(), HOPPER) == "tma"
    assert product_kernel(a, b.t().contiguous(), HOPPER) == "pointer"
    assert product_kernel(a.t(), b.t(), HOPPER) == "pointer"


def images(*shape, dtype=torch.bfloat16, seed=0):
    return integers(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def filters(*shape, dtype=torch.bfloat16):
    return images(*shape, dtype=dtype, seed=1)


W33 = (32, 24, 3, 3)
CONVOLUTION_BORDERS = {  # operands and options, and the kernels that a Hopper GPU takes for them
    "3x3": (lambda: (images(2, 24, 8, 8), filters(*W33)), dict(padding=1), "tma"),
    "no padding": (lambda: (images(2, 24, 8, 8), filters(*W33)), {}, "tma"),
    "fp16": (lambda: (images(2, 24, 8, 8).half(), filters(*W33).half()), {}, "tma"),
    "filters of [K, C, R, S]": (
        lambda: (images(2, 24, 8, 8), filters(*W33).contiguous()), {}, "pack_filter tma"
    ),
    "filters off by one element": (
        lambda: (images(2, 24, 8, 8), unaligned(filters(*W33))), {}, "pack_filter tma"
    ),
    "filters that are every second": (
        lambda: (images(2, 24, 8, 8), filters(64, 24, 3, 3)[::2]), {}, "tma"
    ),
    "filters flipped in memory": (
        lambda: (images(2, 24, 8, 8), filters(*W33).transpose(2, 3)), {}, "pack_filter tma"
    ),
    "one filter for all": (
        lambda: (images(2, 24, 8, 8), filters(1, 24, 3, 3).expand(32, -1, -1, -1)), {},
        "pack_filter tma",
    ),
    # channels
    "12 channels": (lambda: (images(2, 12, 8, 8), filters(32, 12, 3, 3)), {}, "flat"),
    "20 channels": (lambda: (images(2, 20, 8, 8), filters(32, 20, 3, 3)), {}, "pointer"),
    "8 channels": (lambda: (images(2, 8, 8, 8), filters(32, 8, 3, 3)), {}, "tma"),
    "3 channels": (
        lambda: (images(2, 3, 8, 8), filters(32, 3, 3, 3)), {}, "pack pack_filter tma"
    ),
    "3 channels of [N, C, H, W]": (
        lambda: (integers(2, 3, 8, 8, dtype=torch.bfloat16), filters(32, 3, 3, 3)),
        dict(stride=2), "pack pack_filter tma",
    ),
    "3 channels, off by one element": (
        lambda: (unaligned(images(2, 3, 8, 8)), filters(32, 3, 3, 3)), {}, "pack pack_filter tma"
    ),
    "3 channels, patches of 36x36": (
        lambda: (images(1, 3, 72, 72), filters(8, 3, 36, 36)), dict(stride=36),
        "pack pack_filter tma",
    ),
    "3 channels, patches of 37x37: more than a program packs": (
        lambda: (images(1, 3, 74, 74), filters(8, 3, 37, 37)), dict(stride=37), "flat"
    ),
    "3 channels, dilation": (
        lambda: (images(2, 3, 8, 8), filters(32, 3, 3, 3)), dict(dilation=2), "flat"
    ),
    "20 filters": (lambda: (images(2, 24, 8, 8), filters(20, 24, 3, 3)), {}, "pointer"),
    "20 filters, few channels": (
        lambda: (images(2, 3, 8, 8), filters(20, 3, 3, 3)), {}, "flat"
    ),
    # images
    "an image of one pixel": (
        lambda: (images(2, 24, 1, 1), filters(*W33)), dict(padding=1), "tma"
    ),
    "an image of one pixel, stride 2": (
        lambda: (images(2, 24, 1, 1), filters(*W33)), dict(padding=1, stride=2), "pointer"
    ),
    "taps in the padding alone": (
        lambda: (images(2, 24, 1, 1), filters(*W33)), dict(padding=4, stride=8), "pointer"
    ),
    "an odd height at stride 2": (
        lambda: (images(2, 24, 9, 8), filters(*W33)), dict(padding=1, stride=2), "pointer"
    ),
    "an odd width at stride 2": (
        lambda: (images(2, 24, 8, 9), filters(*W33)), dict(padding=1, stride=2), "pointer"
    ),
    "an odd width at stride (2, 1)": (
        lambda: (images(2, 24, 8, 9), filters(*W33)), dict(padding=1, stride=(2, 1)), "tma"
    ),
    "odd sides at stride 2, the last row and column unread": (
        lambda: (images(2, 24, 9, 9), filters(32, 24, 2, 2)), dict(stride=2), "tma"
    ),
    "dilation": (
        lambda: (images(2, 24, 9, 9), filters(*W33)), dict(padding=2, dilation=2), "tma"
    ),
    # strides and addresses
    "[N, C, H, W] in memory": (
        lambda: (images(2, 24, 8, 8).contiguous(), filters(*W33)), {}, "pointer"
    ),
    "a channel slice at a multiple of 8": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(*W33)), dict(padding=1), "tma"
    ),
    "the same at stride 2: pixels do not lie side by side": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(*W33)), dict(stride=2), "pointer"
    ),
    "the same at stride (2, 1)": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(*W33)), dict(stride=(2, 1)), "tma"
    ),
    "a channel slice from the first on": (
        lambda: (images(2, 25, 8, 8)[:, 1:], filters(*W33)), {}, "pointer"
    ),
    "a channel slice from the fourth on": (
        lambda: (images(2, 32, 8, 8)[:, 4:28], filters(*W33)), {}, "pointer"
    ),
    "off by one element": (
        lambda: (unaligned(images(2, 24, 8, 8)), filters(*W33)), {}, "pointer"
    ),
    "a cropped image": (
        lambda: (images(2, 24, 12, 12)[:, :, 1:9, 3:11], filters(*W33)), dict(padding=1), "tma"
    ),
    "a cropped image at stride 2": (
        lambda: (images(2, 24, 12, 12)[:, :, 1:9, 3:11], filters(*W33)),
        dict(padding=1, stride=2), "tma",
    ),
    "every second image": (lambda: (images(4, 24, 8, 8)[::2], filters(*W33)), {}, "tma"),
    "height and width exchanged": (
        lambda: (images(2, 24, 8, 9).transpose(2, 3), filters(*W33)), dict(padding=1), "tma"
    ),
    "one image for all": (
        lambda: (images(1, 24, 8, 8).expand(3, -1, -1, -1), filters(*W33)), {}, "pointer"
    ),
    "one row for all": (
        lambda: (images(2, 24, 1, 8).expand(-1, -1, 8, -1), filters(*W33)), {}, "pointer"
    ),
    "float32 as IEEE has it": (
        lambda: (images(2, 24, 8, 8).float(), filters(*W33).float()), {}, "pointer"
    ),
    # groups
    "8 groups of 4": (
        lambda: (images(2, 32, 8, 8), filters(32, 4, 3, 3)), dict(groups=8), "pack_filter tma"
    ),
    "2 groups of 64": (
        lambda: (images(2, 64, 8, 8), filters(128, 32, 3, 3)), dict(groups=2), "tma"
    ),
    "2 groups of 12 filters": (
        lambda: (images(2, 32, 8, 8), filters(24, 16, 3, 3)), dict(groups=2), "pointer"
    ),
    "2 groups of 96 filters": (
        lambda: (images(2, 32, 8, 8), filters(192, 16, 3, 3)), dict(groups=2), "pointer"
    ),
    "3 groups of 4 channels": (
        lambda: (images(2, 12, 8, 8), filters(24, 4, 3, 3)), dict(groups=3), "flat"
    ),
    "2 groups of 4 channels: 64 filters begin at the fourth": (
        lambda: (images(2, 8, 8, 8), filters(128, 4, 3, 3)), dict(groups=2), "flat"
    ),
    "4 groups of 2 channels and 32 filters": (
        lambda: (images(2, 8, 8, 8), filters(128, 2, 3, 3)), dict(groups=4), "flat"
    ),
    # a filter of one pixel
    "1x1": (
        lambda: (images(2, 24, 8, 8), filters(32, 24, 1, 1)), {}, "matmul_tma"
    ),
    "1x1 of an odd image": (
        lambda: (images(2, 24, 7, 5), filters(32, 24, 1, 1).contiguous()), {}, "matmul_tma"
    ),
    "1x1, 20 channels": (
        lambda: (images(2, 20, 8, 8), filters(32, 20, 1, 1)), {}, "matmul"
    ),
    "1x1, a cropped image": (
        lambda: (images(2, 24, 12, 12)[:, :, 1:9, 3:11], filters(32, 24, 1, 1)), {}, "tma"
    ),
    "1x1, a channel slice": (
        lambda: (images(2, 48, 8, 8)[:, 16:40], filters(32, 24, 1, 1)), {}, "matmul_tma"
    ),
    "1x1, [N, C, H, W] in memory, many": (
        lambda: (images(2, 24, 8, 8).contiguous(), filters(32, 24, 1, 1)), {}, "pointer"
    ),
    "1x1, stride 2": (
        lambda: (images(2, 24, 7, 9), filters(32, 24, 1, 1)), dict(stride=2), "tma"
    ),
    "1x1, padding": (
        lambda: (images(2, 24, 8, 8), filters(32, 24, 1, 1)), dict(padding=1), "tma"
    ),
    "1x1, groups": (
        lambda: (images(2, 128, 8, 8), filters(128, 64, 1, 1)), dict(groups=2), "tma"
    ),
    "1x1, 3 channels": (
        lambda: (images(2, 3, 8, 8), filters(32, 3, 1, 1)), {}, "matmul"
    ),
    # nothing
    "no images": (lambda: (images(0, 24, 8, 8), filters(*W33)), {}, ""),
    "no images, 1x1": (lambda: (images(0, 24, 8, 8), filters(32, 24, 1, 1)), {}, ""),
    "no filters": (lambda: (images(2, 24, 8, 8), filters(0, 24, 3, 3)), {}, ""),
    "no channels": (lambda: (images(2, 0, 8, 8), filters(32, 0, 3, 3)), {}, "flat"),
}  # fmt: skip


def chosen(x, weight, device, fn=conv2d, **options):
    """The names of the kernels that a call would launch."""
    names = launched(device, fn, x, weight, **options)
    return " ".join("pointer" if n == "conv2d" else n.removeprefix("conv2d_") for n in names)


@pytest.mark.parametrize(
    "inputs, options, kernels", CONVOLUTION_BORDERS.values(), ids=CONVOLUTION_BORDERS
)
def test_borders_of_conv2d(inputs, options, kernels):
    x, weight = inputs()
    assert chosen(x, weight, HOPPER, **options) == kernels
    assert "tma" not in chosen(x, weight, AMPERE, **options)
    groups = options.get("groups", 1)
    few_channels = weight.shape[1] < LESSONS["conv2d"].FEW_CHANNELS
    where = "conv2d_grouped" if groups > 1 else "conv2d_flat" if few_channels else "conv2d"
    with use_tile(
        "matmul" if "matmul" in kernels else where,
        MATMUL_TILES[2][0] if "matmul" in kernels else SMALL,
    ):
        if "tma" in kernels:
            y = conv2d(x, weight, **options)
        elif kernels:
            with pytest.raises(ValueError, match="cannot take these"):
                conv2d(x, weight, **options)
    if "tma" not in kernels:
        y = conv2d(x, weight, **options)
    if 0 in weight.shape[:2]:  # which torch refuses, or returns no filters for
        want = torch.zeros_like(y, dtype=torch.float64)
    else:
        want = conv2d_reference(*double(x, weight), **options)
    assert torch.equal(y, want.to(y.dtype))
    assert want.any() or 0 in (*x.shape, *weight.shape) or options.get("stride") == 8


POOL_BORDERS = {
    "3x3": (lambda: (images(2, 24, 8, 8), filters(*W33)), "tma"),
    "filters of [K, C, R, S]": (
        lambda: (images(2, 24, 8, 8), filters(*W33).contiguous()), "pack_filter tma"
    ),
    "an odd image": (lambda: (images(2, 24, 9, 7), filters(*W33)), "tma"),
    "3 channels": (lambda: (images(2, 3, 8, 8), filters(32, 3, 3, 3)), "relu_pool"),
    "24 filters: of the places 16 bytes": (
        lambda: (images(2, 24, 8, 8), filters(24, 24, 3, 3)), "relu_pool"
    ),
    "20 channels": (lambda: (images(2, 20, 8, 8), filters(32, 20, 3, 3)), "relu_pool"),
    "off by one element": (
        lambda: (unaligned(images(2, 24, 8, 8)), filters(*W33)), "relu_pool"
    ),
    "[N, C, H, W] in memory": (
        lambda: (images(2, 24, 8, 8).contiguous(), filters(*W33)), "relu_pool"
    ),
    "float32 as IEEE has it": (
        lambda: (images(2, 24, 8, 8).float(), filters(*W33).float()), "relu_pool"
    ),
    "no images": (lambda: (images(0, 24, 8, 8), filters(*W33)), ""),
}  # fmt: skip


@pytest.mark.parametrize("inputs, kernels", POOL_BORDERS.values(), ids=POOL_BORDERS)
def test_borders_of_conv2d_relu_pool(inputs, kernels):
    x, weight = inputs()
    assert chosen(x, weight, HOPPER, conv2d_relu_pool) == kernels
    assert "tma" not in chosen(x, weight, AMPERE, conv2d_relu_pool)
    with use_tile("conv2d_relu_pool", SMALL) if "tma" in kernels else contextlib.nullcontext():
        y = conv2d_relu_pool(x, weight)
    assert torch.equal(y, LESSONS["conv2d_relu_pool"].reference(*double(x, weight)).to(y.dtype))


def test_tf32_convolutions_take_multiples_of_four_channels(tf32):
    x, weight = images(2, 20, 8, 8).float(), filters(36, 20, 3, 3).float()
    assert chosen(x, weight, HOPPER) == "tma"
    assert chosen(x, weight[:34], HOPPER) == chosen(x[:, :18], weight[:, :18], HOPPER) == "pointer"
    assert chosen(x.contiguous(), weight, HOPPER) == "pointer"
    assert chosen(x[:, :3], weight[:, :3], HOPPER) == "pack pack_filter tma"


C33, S2 = Conv((2, 24, 8, 8), 32, (3, 3), 1, 1), Conv((2, 64, 8, 8), 32, (3, 3), 2, 1)
same = tuple
INPUT_BORDERS = {
    # the convolution, what becomes of dy, weight and x, the kernels that a Hopper GPU takes, and
    # those through a ReLU; "" for the first ones and bias_activation_backward
    "3x3": (C33, same, "tma", "tma"),
    "fp16": (C33, lambda ts: [t.half() for t in ts], "tma", "tma"),
    "stride 2": (S2, same, "tma", "tma"),
    "filters of [K, C, R, S]": (
        C33, lambda ts: (ts[0], ts[1].contiguous(), ts[2]), "pack_filter tma", "pack_filter tma"
    ),
    "filters off by one element": (
        C33, lambda ts: (ts[0], unaligned(ts[1]), ts[2]), "pack_filter tma", "pack_filter tma"
    ),
    "dy off by one element": (C33, lambda ts: (unaligned(ts[0]), *ts[1:]), "pointer", ""),
    "dy of [N, K, P, Q]": (C33, lambda ts: (ts[0].contiguous(), *ts[1:]), "pointer", ""),
    "one dy for all": (
        C33, lambda ts: (ts[0][:1].expand(2, -1, -1, -1), *ts[1:]), "pointer", ""
    ),
    "x off by one element": (C33, lambda ts: (*ts[:2], unaligned(ts[2])), "tma", ""),
    "x of [N, C, H, W]": (C33, lambda ts: (*ts[:2], ts[2].contiguous()), "tma", ""),
    "float32 as IEEE has it": (C33, lambda ts: [t.float() for t in ts], "pointer", ""),
    "20 channels": (Conv((2, 20, 8, 8), 32, (3, 3)), same, "pointer", ""),
    "20 filters": (Conv((2, 24, 8, 8), 20, (3, 3)), same, "pointer", ""),
    "3 channels": (Conv((2, 3, 8, 8), 32, (3, 3)), same, "pack_filter tma unfold", ""),
    "3 channels, dilation 2": (Conv((2, 3, 8, 8), 32, (3, 3), 1, 0, 2), same, "pointer", ""),
    "2 groups": (Conv((2, 64, 8, 8), 64, (3, 3), groups=2), same, "pointer", ""),
    "an odd height at stride 2": (Conv((2, 64, 9, 8), 32, (3, 3), 2, 1), same, "pointer", ""),
    "an odd width at stride 2": (Conv((2, 64, 8, 9), 32, (3, 3), 2, 1), same, "pointer", ""),
    "56 channels at stride 2": (Conv((2, 56, 8, 8), 32, (3, 3), 2, 1), same, "pointer", ""),
    "56 channels at stride (2, 1)": (
        Conv((2, 56, 8, 8), 32, (3, 3), (2, 1), 1), same, "tma", "tma"
    ),
    "1x1": (Conv((2, 24, 8, 8), 32, (1, 1)), same, "matmul_tma", "tma"),
    "1x1, 20 filters": (Conv((2, 24, 8, 8), 20, (1, 1)), same, "matmul", ""),
    "1x1, padding": (Conv((2, 24, 8, 8), 32, (1, 1), padding=1), same, "tma", "tma"),
    "1x1, stride 2": (Conv((2, 64, 8, 8), 32, (1, 1), 2), same, "tma", "tma"),
    "1x1, dy of [N, K, P, Q]": (
        Conv((2, 24, 8, 8), 32, (1, 1)), lambda ts: (ts[0].contiguous(), *ts[1:]), "pointer", ""
    ),
}  # fmt: skip


def gradient_kernels(device, fn, *args):
    short = {"conv2d_input_grad": "pointer", "conv2d_input_grad_tma": "tma"}
    return " ".join(short.get(n, n.removeprefix("conv2d_")) for n in launched(device, fn, *args))


@pytest.mark.parametrize("conv, change, kernels, relu", INPUT_BORDERS.values(), ids=INPUT_BORDERS)
def test_borders_of_the_input_gradient(conv, change, kernels, relu):
    made = make_input_gradient(conv, torch.bfloat16, "channels_last", integers)
    dy, w, x = change(made)
    plain = dy, w, list(conv.x), *conv.lists
    masked = dy, w, x, *conv.lists
    relu = f"{relu} sum_partials" if relu else f"{kernels} bias_activation_backward"
    assert gradient_kernels(HOPPER, conv2d_input_grad, *plain) == kernels
    assert gradient_kernels(HOPPER, conv2d_input_grad_relu, *masked) == relu
    assert "tma" not in gradient_kernels(AMPERE, conv2d_input_grad, *plain)
    assert "tma" not in gradient_kernels(AMPERE, conv2d_input_grad_relu, *masked)

    (want,) = input_gradient64(conv, [dy, w, x])
    dz, dbias = through_relu64(conv, [dy, w, x])
    assert min(t.count_nonzero() / t.numel() for t in (want, dz, dbias)) > 1 / 16
    can = ["tma"] * ("tma" in kernels.split()) + ["pointer"] * ("matmul" not in kernels)
    for kind, tile in [("tma", SMALL), ("pointer", POINTERS[0])]:
        with use_tile("conv2d_input_grad", tile):
            if kind in can:
                assert torch.equal(conv2d_input_grad(*plain), want.to(dy.dtype))
            elif can:
                with pytest.raises(ValueError, match="cannot take these operands"):
                    conv2d_input_grad(*plain)
    if not can:
        assert torch.equal(conv2d_input_grad(*plain), want.to(dy.dtype))
    for tile in (SMALL, POINTERS[0]):  # of which the second, or no choice, is the composition
        with use_tile("conv2d_input_grad_relu", tile):
            got = conv2d_input_grad_relu(*masked)
        assert torch.equal(got[0], dz.to(dy.dtype)) and got[0].stride() == x.stride()
        assert_close(got[1], dbias, dtype=dy.dtype, terms=1, name="dbias")


def test_no_images_have_no_input_gradient():
    conv = Conv((0, 24, 8, 8), 32, (3, 3))
    dy, w, x = make_input_gradient(conv, torch.bfloat16, "channels_last", integers)
    assert gradient_kernels(HOPPER, conv2d_input_grad, dy, w, list(conv.x), *conv.lists) == ""
    dz, dbias = conv2d_input_grad_relu(dy, w, x, *conv.lists)
    assert dz.shape == conv.x and torch.equal(dbias, torch.zeros(24, dtype=torch.bfloat16))


def test_tf32_input_gradients_take_multiples_of_four_channels(tf32):
    for C, K, kernels in [(20, 36, "pack_filter tma"), (18, 36, "pointer"), (20, 34, "pointer")]:
        conv = Conv((2, C, 8, 8), K, (3, 3))
        dy, w, _ = make_input_gradient(conv, torch.float32, "channels_last", integers)
        assert (
            gradient_kernels(HOPPER, conv2d_input_grad, dy, w, list(conv.x), *conv.lists) == kernels
        )
    conv = Conv((2, 20, 8, 8), 36, (1, 1))  # a matmul would want its columns packed, too
    assert_exact(KERNELS["conv2d_input_grad"], conv, CONV2D_TILES[4][1], torch.float32)


X, DY = (16, 24, 5, 6), (16, 32, 5, 6)  # of a 3x3 layer with padding 1
WEIGHT_BORDERS = {  # x, dy and options, and the kernels that a Hopper GPU takes for them
    "3x3": (lambda: (images(*X), images(*DY)), {}, "tma"),
    "fp16": (lambda: (images(*X).half(), images(*DY).half()), {}, "tma"),
    "float32": (lambda: (images(*X).float(), images(*DY).float()), {}, "portable"),
    "filters of [K, C, R, S]": (
        lambda: (images(*X), images(*DY)), dict(weight="contiguous"), "tma"
    ),
    # the batch, channels and filters
    "15 images": (lambda: (images(15, *X[1:]), images(15, *DY[1:])), {}, "portable"),
    "20 channels": (lambda: (images(16, 20, 5, 6), images(*DY)), {}, "portable"),
    "8 channels": (lambda: (images(16, 8, 5, 6), images(*DY)), {}, "tma"),
    "3 channels": (lambda: (images(16, 3, 5, 6), images(*DY)), {}, "pack tma"),
    "3 channels, off by one element": (
        lambda: (unaligned(images(16, 3, 5, 6)), images(*DY)), {}, "pack tma"
    ),
    "3 channels, dilation": (
        lambda: (images(16, 3, 5, 6), images(16, 32, 3, 4)), dict(dilation=2), "portable"
    ),
    "12 filters": (lambda: (images(*X), images(16, 12, 5, 6)), {}, "portable"),
    "2 groups": (lambda: (images(16, 48, 5, 6), images(*DY)), dict(groups=2), "portable"),
    # strides and addresses
    "x as [N, C, H, W]": (lambda: (images(*X).contiguous(), images(*DY)), {}, "portable"),
    "dy as [N, K, P, Q]": (lambda: (images(*X), images(*DY).contiguous()), {}, "portable"),
    "x off by one element": (lambda: (unaligned(images(*X)), images(*DY)), {}, "portable"),
    "dy off by one element": (lambda: (images(*X), unaligned(images(*DY))), {}, "portable"),
    "slices of channels": (
        lambda: (images(16, 48, 5, 6)[:, 16:40], images(16, 48, 5, 6)[:, 8:40]), {}, "tma"
    ),
    "a slice from the fourth channel on": (
        lambda: (images(16, 32, 5, 6)[:, 4:28], images(*DY)), {}, "portable"
    ),
    "a cropped image": (
        lambda: (images(16, 24, 8, 8)[:, :, 1:6, 1:7], images(*DY)), {}, "tma"
    ),
    "a cropped dy": (lambda: (images(*X), images(16, 32, 8, 8)[:, :, 1:6, 1:7]), {}, "tma"),
    "every second image": (lambda: (images(32, *X[1:])[::2], images(32, *DY[1:])[1::2]), {}, "tma"),
    "one image for all": (
        lambda: (images(1, *X[1:]).expand(16, -1, -1, -1), images(*DY)), {}, "portable"
    ),
    "one number for all of dy": (
        lambda: (images(*X), integers(1, dtype=torch.bfloat16).add(3).expand(DY)), {}, "portable"
    ),
    # a filter of one pixel
    "1x1: pixels are the batch": (
        lambda: (images(2, 24, 5, 6), images(2, 32, 5, 6)), dict(taps=(1, 1), padding=0), "tma"
    ),
    "1x1, one row each": (
        lambda: (images(2, 24, 1, 8), images(2, 32, 1, 8)), dict(taps=(1, 1), padding=0), "tma"
    ),
    "1x1, 15 pixels": (
        lambda: (images(1, 24, 3, 5), images(1, 32, 3, 5)), dict(taps=(1, 1), padding=0), "portable"
    ),
    "1x1 of a cropped image": (
        lambda: (images(16, 24, 8, 8)[:, :, 1:6, 1:7], images(*DY)),
        dict(taps=(1, 1), padding=0), "tma",
    ),
    "1x1 of few cropped images": (
        lambda: (images(2, 24, 8, 8)[:, :, 1:6, 1:7], images(2, 32, 5, 6)),
        dict(taps=(1, 1), padding=0), "portable",
    ),
    # nothing
    "no images": (lambda: (images(0, *X[1:]), images(0, *DY[1:])), {}, "portable"),
    "no filters": (lambda: (images(*X), images(16, 0, 5, 6)), {}, ""),
}  # fmt: skip


def weight_call(x, dy, taps=(3, 3), padding=1, dilation=1, groups=1, weight="channels_last"):
    """(dweight, dbias), and what they should be."""
    w = torch.zeros(dy.shape[1], x.shape[1] // groups, *taps, dtype=x.dtype, device=x.device)
    w = laid_out(w, weight)
    got = conv2d_weight_bias_grad(x, dy, w, [1, 1], [padding] * 2, [dilation] * 2, groups)
    if 0 in dy.shape:
        return got, [torch.zeros_like(t, dtype=torch.float64) for t in got]
    w = w.double().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), w, None, 1, padding, dilation, groups)
    return got, [*torch.autograd.grad(y, [w], dy.double()), dy.double().sum((0, 2, 3))]


def weight_kernels(device, *args, **options):
    """The names of the kernels that a call would launch, but for sums of parts."""
    short = {"conv2d_weight_grad": "portable", "conv2d_weight_grad_tma": "tma"}
    short["conv2d_pack"] = "pack"
    names = launched(device, weight_call, *args, **options)
    return " ".join(short[n] for n in names if n != "sum_partials")


@pytest.mark.parametrize("inputs, options, kernels", WEIGHT_BORDERS.values(), ids=WEIGHT_BORDERS)
def test_borders_of_the_weight_gradient(inputs, options, kernels):
    x, dy = inputs()
    assert weight_kernels(HOPPER, x, dy, **options) == kernels
    assert weight_kernels(AMPERE, x, dy, **options) == ("portable" if kernels else "")
    if "tma" in kernels:
        with use_tile("conv2d_weight_grad", TILE["64x64x32"]), poison() as p:
            got, want = weight_call(p(x), p(dy), **options)
    else:
        got, want = weight_call(x, dy, **options)
        with (
            use_tile("conv2d_weight_grad", TILE["64x64x32"]),
            pytest.raises(ValueError, match="cannot take these"),
        ):
            weight_call(x, dy, **options)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w.to(g.dtype)) and (w.any() or 0 in dy.shape)


@pytest.mark.parametrize("capability", [0, 80, 89])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "conv2d_input_grad_relu"])
def test_older_devices_have_portable_kernels_alone(name, capability):
    """The gradient through a ReLU is two portable kernels there, whatever the tile."""
    fast = KERNELS[name]
    layer = fast.layers[fast.wide[0]]
    tensors = fast.make(layer, torch.bfloat16, "channels_last", integers)
    with _launch.record(Device(capability, sms=100)), forced(fast, layer, fast.small):
        with pytest.raises(ValueError, match="cannot take these"):
            fast.call(layer, tensors)


@pytest.mark.parametrize("tile, more", [("pool", dict(SPLIT_K=2)), ("groups", dict(SPLIT_K=2)),
                                        ("groups", dict(BLOCK_N=128))], ids=str)  # fmt: skip
def test_tiles_that_groups_and_pools_cannot_have(tile, more):
    """A pool's places would be written beyond their end, groups be another block's."""
    bad = SMALL | more
    x, weight = randn(2, 64, 8, 8, dtype=torch.float16), randn(64, 64, 3, 3, dtype=torch.float16)
    x = laid_out(x, "channels_last")
    with pytest.raises(ValueError, match="BLOCK_N=64, groups and pools of SPLIT_K=1; got"):
        if tile == "pool":
            with use_tile("conv2d_relu_pool", bad):
                conv2d_relu_pool(x, weight)
        else:
            with use_tile("conv2d_grouped", bad):
                conv2d(x, weight[:, :16], groups=4)


def test_tiles_that_gradients_cannot_have():
    conv = INPUT_GRADIENTS["3x3"]
    tensors = make_input_gradient(conv, torch.float16, "channels_last", integers)
    with use_tile("conv2d_input_grad_relu", SMALL | dict(SPLIT_K=2)):
        with pytest.raises(ValueError, match="SPLIT_K=1, got"):
            through_relu(conv, tensors)
    conv = WEIGHT_GRADIENTS["3x3"]
    tensors = make_weight_gradient(conv, torch.float16, "channels_last", integers)
    with use_tile("conv2d_weight_grad", TILE["64x64x32"] | dict(SUBTILES=3)):
        with pytest.raises(ValueError, match="1, 2 or 4 of its SUBTILES"):
            weight_gradient(conv, tensors)


def test_packing_leaves_a_forced_tile_as_it_is():
    tile = dict(BLOCK_M=64, BLOCK_N=16, num_warps=4)
    given = tile.copy()
    x, weight = randn(1, 3, 16, 16, dtype=torch.float16), randn(8, 3, 8, 8, dtype=torch.float16)
    with use_tile("conv2d_flat", SMALL), use_tile("conv2d_pack", tile):
        conv2d(x, weight, stride=8)
    assert tile == given


# --- on a GPU -------------------------------------------------------------------------------------

REAL = {
    "matmul": {"2056x4104x1032": (2056, 4104, 1032, "contiguous", "transposed")},
    "conv2d": {
        "3x3": Conv((64, 128, 56, 56), 136, (3, 3), 1, 1),
        "3x3, stride 2": Conv((64, 136, 56, 56), 256, (3, 3), 2, 1),
        "7x7, stride 2": Conv((64, 3, 224, 224), 64, (7, 7), 2, 3),
        "14x14 pixels": Conv((65, 256, 14, 14), 264, (3, 3), 1, 1),
        "32 groups of 4": Conv((64, 128, 56, 56), 128, (3, 3), 1, 1, 1, 32),
    },
    "conv2d_relu_pool": {"27x27": ((64, 128, 27, 27), 256, (3, 3), 1)},
    "conv2d_input_grad": {
        "3x3": Conv((64, 136, 56, 56), 128, (3, 3), 1, 1),
        "3x3, stride 2": Conv((64, 136, 56, 56), 256, (3, 3), 2, 1),
    },
    "conv2d_input_grad_relu": {"dilation 2": Conv((16, 128, 56, 56), 128, (3, 3), 1, 2, 2)},
    "conv2d_weight_grad": {
        "3x3": Conv((64, 128, 56, 56), 136, (3, 3), 1, 1),
        "1x1": Conv((32, 256, 28, 28), 512, (1, 1)),
        "7x7, stride 2": Conv((32, 3, 224, 224), 64, (7, 7), 2, 3),
        "64 channels": Conv((32, 64, 56, 56), 64, (3, 3), 1, 1),
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, layer", [(n, layer) for n, found in REAL.items() for layer in found]
)
def test_every_fast_tile_at_real_size(name, layer):
    """Every program takes several turns; whole, in parts, and by the default, in integers."""
    kernels = _launch.device_of(torch.empty(1, device=DEVICE)).kernels
    if "tma" not in kernels:
        pytest.skip("this GPU has no tensor memory accelerator")
    fast, sizes = KERNELS[name], REAL[name][layer]
    tensors = fast.make(sizes, torch.bfloat16, "channels_last", integers)
    want = fast.call(sizes, tensors)  # by the default
    for g, w in zip(want, fast.want(sizes, tensors), strict=True):
        assert torch.equal(g, w.to(g.dtype)) and g.any()
    for tile in fast.tiles[2]:
        large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128 and name != "conv2d_weight_grad"
        for split in (1, 3) if fast.parts and not large else (1,):
            if tile["kernel"] in kernels:
                with forced(fast, sizes, tile | dict(SPLIT_K=split)):
                    for g, w in zip(fast.call(sizes, tensors), want, strict=True):
                        assert torch.equal(g, w)

"""What a launch by TMA follows from: the plan of a call, its boxes of pixels, the default tile.

No kernel runs here. A plan says what of a tensor the unit is to read; test_fast.py shows that it is
the right thing.
"""

import importlib
import itertools
import json
import timeit

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.kernels.test_fast import (
    CONVOLUTIONS,
    GEMM_SMALL,
    INPUT_GRADIENTS,
    WEIGHT_GRADIENTS,
    tile_id,
)
from tests.tools.convolutions import Conv
from tests.tools.inputs import laid_out, randn
from tilelab.kernels import _launch, _tiles, conv2d_tma, matmul_tma
from tilelab.kernels import conv2d_input_grad_tma as input_grad_tma
from tilelab.kernels import conv2d_weight_grad_tma as weight_grad_tma
from tilelab.kernels._geometry import output_size
from tilelab.kernels._launch import Device
from tilelab.kernels.conv2d_tma import GROUP_BLOCK, LARGEST, pixel_box
from tilelab.kernels.conv2d_weight_grad_tma import as_neighbours, pixels_inside
from tilelab.kernels.matmul import TILES

matmul = importlib.import_module("tilelab.kernels.matmul")  # the function hides its lesson

# --- matmul ---------------------------------------------------------------------------------------


def test_kinds_of_kernels():
    def kinds(capability):
        return Device(capability, sms=1).kernels

    assert kinds(80) == kinds(89) == kinds(0) == ("pointer",)
    assert kinds(90) == ("pointer", "tma", "tma_ws")
    assert kinds(100) == kinds(120) == ("pointer", "tma")


HOPPER = Device(90, sms=132)
TMA = ("pointer", "tma", "tma_ws")


def matmul_tile(M, N, K, kind="fp16", layout="nt", kernels=TMA, device=HOPPER):
    item = dict(fp16=2, tf32=4, fp32=4)[kind]
    return matmul.fast_tile(M, N, K, kind, item, layout, kernels, device)


@pytest.mark.parametrize("kind", ["fp16", "tf32", "fp32"])
@pytest.mark.parametrize("device", [HOPPER, Device(80, 108), Device(89, 128), Device(0, 304)])
@pytest.mark.parametrize(
    "M, N, K", [(8192, 8192, 8192), (1, 8, 8), (64, 64, 65536), (256, 256, 65536), (100, 16, 24)]
)
def test_the_default_of_matmul_is_a_tile_of_its_lists(M, N, K, device, kind):
    tile = matmul_tile(M, N, K, kind, kernels=device.kernels, device=device)
    if "kernel" not in tile:
        assert tile in TILES
        return
    item = 2 if kind == "fp16" else 4
    assert tile | dict(SPLIT_K=1) in matmul_tma.FAST_TILES[item] and tile["kernel"] == "tma"
    assert tile["SPLIT_K"] == 1 or tile["SPLIT_K"] * 4 * tile["BLOCK_K"] <= K


def test_defaults_of_matmul_follow_the_shape():
    large = matmul_tile(8192, 8192, 8192)
    assert (large["kernel"], large["BLOCK_N"], large["SPLIT_K"]) == ("tma", 256, 1)
    few = matmul_tile(1, 4096, 4096)
    assert few["BLOCK_M"] <= 64
    deep = matmul_tile(256, 256, 65536)
    assert deep["SPLIT_K"] >= 8
    small = matmul_tile(1024, 1024, 512)  # 32 tiles of 128x256 would leave 100 SMs idle
    assert small["BLOCK_M"] * small["BLOCK_N"] <= 128 * 128
    # Four warps beat eight at 128x128, on the GPUs that it was measured on.
    for device in (Device(80, 108), HOPPER):
        tile = matmul_tile(4096, 4096, 4096, kernels=("pointer",), device=device)
        four = tile["BLOCK_N"] == 128 and tile["num_warps"] == 4
        assert tile["BLOCK_M"] == 128 and tile["BLOCK_K"] == 64 and (four or tile["BLOCK_N"] == 256)


def test_a_gpu_without_facts_and_the_interpreter_take_the_default():
    assert matmul_tile(512, 512, 512, device=Device(75, 72)) is None
    assert matmul_tile(512, 512, 512, device=_launch.INTERPRETER) is None


def test_a_tile_that_was_chosen_once_is_looked_up():
    """A call may spend 10 us on the host for its tile; the model takes 20 us for each of twenty."""
    matmul_tile(4096, 4096, 4095)
    before = matmul.fast_tile.cache_info().hits
    took = min(timeit.repeat(lambda: matmul_tile(4096, 4096, 4095), number=100, repeat=5)) / 100
    assert took < 10e-6 and matmul.fast_tile.cache_info().hits == before + 500


def test_the_tuned_table_may_name_either_kernel(monkeypatch, tmp_path):
    """The nearest tile of a kernel that can take the operands; others are passed over."""
    fast, portable = GEMM_SMALL, TILES[2]
    entries = [
        dict(op="matmul", dtype="bfloat16", sizes=dict(M=64, N=128, K=64), tile=fast),
        dict(op="matmul", dtype="bfloat16", sizes=dict(M=9999, N=9999, K=9999), tile=portable),
    ]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(dict(tiles=entries)))
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "_name", lambda index: "gpu")
    monkeypatch.setattr(_tiles, "_tuned", lambda gpu: _tiles.read_tuned(path))

    def tile(kernels):
        default = {2: TILES[0]}
        x = torch.empty(0, dtype=torch.bfloat16)
        return _tiles.choose_tile("matmul", x, default, kernels, M=64, N=128, K=64)

    assert tile(("pointer", "tma", "tma_ws")) == fast
    assert tile(("pointer",))["BLOCK_N"] == min(128, portable["BLOCK_N"])
    assert "kernel" not in tile(("pointer",))


def test_descriptors_say_what_tritons_own_constructor_says():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = randn(64, 96, dtype=torch.bfloat16)
    mine = _launch.descriptor(x, x.shape, (96, 1), [16, 32])
    theirs = TensorDescriptor.from_tensor(x, [16, 32])
    for field in TensorDescriptor.__dataclass_fields__:
        got, want = getattr(mine, field), getattr(theirs, field)
        assert got is want if field == "base" else (got == want or tuple(got) == tuple(want)), field


# --- the convolution ------------------------------------------------------------------------------


def convolution_plan(conv, item=2, weight="channels_last"):
    x, w = (torch.empty(s, device="meta") for s in (conv.x, conv.weight))
    x, w = laid_out(x, "channels_last"), laid_out(w, weight)
    *geometry, groups = conv.lists
    geometry = (tuple(pair) for pair in geometry)
    return conv2d_tma.make_plan(x.shape, x.stride(), w.shape, w.stride(), *geometry, groups, item)


def test_plans_are_those_of_the_docstring():
    stem = convolution_plan(Conv((8, 3, 224, 224), 64, (7, 7), 2, 3))
    assert stem.fold == (2, 2) and stem.taps == (4, 4) and stem.packed_w
    assert stem.x[0] == (8, 115, 115, 16) and stem.w[0] == (16, 64, 16)
    assert stem.geometry == (1, 1, 0, 0, 1, 1)
    assert convolution_plan(Conv((8, 3, 224, 224), 64, (7, 7), 2, 3), item=4).x[0][3] == 12

    strided = convolution_plan(Conv((8, 64, 56, 56), 128, (3, 3), 2, 1))
    assert strided.x[0] == (8, 28, 2, 28, 128) and strided.fold is None
    assert strided.geometry[:4] == (2, 2, 1, 1)
    shortcut = convolution_plan(Conv((8, 64, 56, 56), 128, (1, 1), 2))
    assert shortcut.x == ((8, 28, 28, 64), (56 * 56 * 64, 2 * 56 * 64, 2 * 64, 1))
    assert shortcut.geometry[:2] == (1, 1)

    groups = convolution_plan(Conv((8, 128, 56, 56), 128, (3, 3), 1, 1, 1, 32))
    assert groups.grouped == (64, 64) and groups.w[0] == (9, 128, 64) and groups.packed_w
    wide = convolution_plan(Conv((8, 128, 56, 56), 256, (3, 3), 1, 1, 1, 2))
    assert wide.grouped == (128, 64) and wide.w[0] == (9, 256, 64) and not wide.packed_w

    plain = Conv((8, 64, 56, 56), 64, (3, 3), 1, 1)
    assert (
        not convolution_plan(plain).packed_w
        and convolution_plan(plain, weight="contiguous").packed_w
    )
    assert convolution_plan(Conv((LARGEST // 8, 64, 8, 8), 64, (3, 3))) is None


@hypothesis.settings(max_examples=100)
@hypothesis.given(
    N=st.integers(1, 4), C=st.integers(1, 12), K=st.integers(1, 12), sides=st.lists(
        st.tuples(
            st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 5),
            st.integers(1, 3),
        ), min_size=2, max_size=2,
    ),
    groups=st.sampled_from([1, 1, 2, 4]), item=st.sampled_from([2, 4]),
    weight=st.sampled_from(["channels_last", "contiguous", "sliced"]),
)  # fmt: skip
def test_plans_are_what_tma_takes_of_the_convolution(N, C, K, sides, groups, item, weight):
    """No size is 0, every step is of 16 bytes, and the last is of one element."""
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    unit = 16 // item
    C = C if C < 4 and groups == 1 else unit * C
    hypothesis.assume(min(output_size(size, taps, stride, padding, dilation)) > 0)
    conv = Conv((N, C * groups, *size), unit * K * groups, taps, stride, padding, dilation, groups)
    plan = convolution_plan(conv, item, weight)
    if plan is None:
        return
    for sizes, steps in (plan.x, plan.w):
        assert len(sizes) == len(steps) <= 5 and min(sizes) > 0
        assert steps[-1] == 1 and not any(step % unit for step in steps[:-1])
    N, P, Q, K = plan.size
    assert (N, K, P, Q) == conv.y and plan.w[0][:2] == (plan.taps[0] * plan.taps[1], K)


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("pixels", [64, 128, 256])
@hypothesis.settings(max_examples=20)
@hypothesis.given(N=st.integers(1, 300), P=st.integers(1, 300), Q=st.integers(1, 300))
def test_no_box_sticks_out_less(N, P, Q, pixels, pooling):
    def covered(box):
        return [-(-size // side) * side for size, side in zip((N, P, Q), box, strict=True)]

    def amount(box):
        n, p, q = covered(box)
        return n * p * q

    n, p, q = pixel_box(N, P, Q, pixels, pooling)
    assert n * p * q == pixels and max(n, p, q) <= 256  # TMA's largest
    assert not pooling or (p >= 2 and q >= 8)
    powers = [1 << i for i in range(9)]
    for i, j in itertools.product(powers, repeat=2):
        if i * j <= pixels and not (pooling and (i < 2 or j < 8)):
            other = pixels // (i * j), i, j
            assert (amount(other), -j) >= (amount((n, p, q)), -q)


def test_boxes_fit_the_images_of_networks():
    assert pixel_box(64, 56, 56, 256) == (4, 8, 8)
    assert pixel_box(64, 14, 14, 256) == (64, 2, 2)
    assert pixel_box(64, 7, 7, 128) == (16, 1, 8)
    assert pixel_box(1, 112, 112, 256) == (1, 16, 16)
    assert pixel_box(1, 1, 1, 256)[1:] == (1, 256)  # all stick out alike: the widest


@pytest.mark.parametrize("item", conv2d_tma.FAST_TILES)
@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_default_is_a_tile_that_can_do_it_of_the_convolution(conv, item):
    plan = convolution_plan(conv, item)
    if plan is None:
        pytest.skip("its channels are no multiple of 16 bytes")
    tile = conv2d_tma.fast_tile(plan, item, HOPPER)
    assert tile | dict(SPLIT_K=1) in conv2d_tma.FAST_TILES[item]
    if plan.grouped:
        assert tile["BLOCK_N"] == GROUP_BLOCK and tile["SPLIT_K"] == 1
    (taps, _, span), _ = plan.w
    steps = taps * -(-span // tile["BLOCK_K"])
    assert tile["SPLIT_K"] == 1 or tile["SPLIT_K"] * 4 <= steps
    assert tile["SPLIT_K"] == 1 or tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128
    assert conv2d_tma.fast_tile(plan, item, HOPPER, True)["SPLIT_K"] == 1


def test_defaults_follow_the_shape_of_the_convolution():
    def default(*conv, sms=132):
        return conv2d_tma.fast_tile(convolution_plan(Conv(*conv)), 2, Device(90, sms))

    large = default((64, 256, 56, 56), 256, (3, 3), 1, 1)
    assert (large["BLOCK_M"], large["BLOCK_N"], large["SPLIT_K"]) == (256, 128, 1)
    assert default((64, 64, 56, 56), 64, (3, 3), 1, 1)["BLOCK_N"] == 64
    assert default((64, 3, 224, 224), 64, (7, 7), 2, 3)["BLOCK_K"] == 16
    assert default((64, 32, 56, 56), 64, (3, 3), 1, 1)["BLOCK_K"] == 32
    few = default((1, 512, 7, 7), 512, (3, 3), 1, 1)
    assert few["SPLIT_K"] > 1 and few["BLOCK_M"] == 128
    assert default((1, 512, 7, 7), 512, (3, 3), 1, 1, sms=1)["SPLIT_K"] == 1


# --- the input gradient ---------------------------------------------------------------------------


def input_plan(conv, item=2, weight="channels_last"):
    dy, w = (torch.empty(s, device="meta") for s in (conv.y, conv.weight))
    dy, w = laid_out(dy, "channels_last"), laid_out(w, weight)
    *geometry, groups = conv.lists
    geometry = (tuple(pair) for pair in geometry)
    return input_grad_tma.make_plan(
        dy.shape, dy.stride(), w.shape, w.stride(), conv.x, *geometry, groups, item
    )


def test_plans_of_the_input_gradient():
    plan = input_plan(INPUT_GRADIENTS["stride 2"])
    assert plan.size == (3, 6, 10, 72) and plan.taps == (3, 3)
    assert plan.x == ((3, 3, 5, 24), (360, 120, 24, 1))
    assert plan.w == ((9, 24, 72), (72, 648, 1)) and not plan.packed_w
    packed = input_plan(INPUT_GRADIENTS["stride 2"], weight="contiguous")
    assert packed.w == ((9, 72, 24), (24, 216, 1)) and packed.packed_w
    assert input_plan(INPUT_GRADIENTS["stride 2"], item=4).packed_w
    assert input_plan(Conv((LARGEST // 8, 64, 8, 8), 64, (3, 3))) is None


@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_classes_with_most_taps_come_first_of_the_input_gradient(stride, dilation):
    for taps in range(1, 8):
        reached = [sum((h - r * dilation) % stride == 0 for r in range(taps))
                   for h in range(stride)]  # fmt: skip
        assert input_grad_tma._taps_of_classes(taps, stride, dilation) == sorted(
            reached, reverse=True
        )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("item", conv2d_tma.FAST_TILES)
@pytest.mark.parametrize("layer", INPUT_GRADIENTS)
def test_the_default_is_a_tile_that_can_do_it_of_the_input_gradient(layer, item, relu):
    tile = input_grad_tma.fast_tile(input_plan(INPUT_GRADIENTS[layer], item), item, HOPPER, relu)
    assert tile | dict(SPLIT_K=1) in conv2d_tma.FAST_TILES[item]
    large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128
    assert tile["SPLIT_K"] == 1 or not (relu or large)
    assert not (large and relu and item == 4)


def test_defaults_follow_the_shape_of_the_input_gradient():
    def default(*conv, sms=132, relu=False):
        return input_grad_tma.fast_tile(input_plan(Conv(*conv)), 2, Device(90, sms), relu)

    large = default((64, 256, 56, 56), 256, (3, 3), 1, 1)
    assert (large["BLOCK_M"], large["BLOCK_N"], large["SPLIT_K"]) == (256, 128, 1)
    assert default((64, 64, 56, 56), 64, (3, 3), 1, 1)["BLOCK_N"] == 64
    assert default((64, 64, 56, 56), 32, (3, 3), 1, 1)["BLOCK_K"] == 32
    strided = default((256, 256, 28, 28), 256, (3, 3), 2, 1)
    assert (strided["BLOCK_M"], strided["BLOCK_N"]) == (256, 128)
    few = (1, 512, 7, 7), 512, (3, 3), 1, 1
    assert default(*few)["SPLIT_K"] > 1 and default(*few, relu=True)["SPLIT_K"] == 1
    assert default(*few, sms=1)["SPLIT_K"] == 1


# --- the weight gradient --------------------------------------------------------------------------


def weight_plan(conv):
    x, dy = (laid_out(torch.empty(s, device="meta"), "channels_last") for s in (conv.x, conv.y))
    *geometry, groups = conv.lists
    geometry = (tuple(pair) for pair in geometry)
    return weight_grad_tma.make_plan(
        x.shape, x.stride(), dy.shape, dy.stride(), conv.taps, *geometry, groups
    )


def test_plans_are_those_of_the_lesson():
    plain = weight_plan(Conv((64, 256, 14, 14), 512, (3, 3), 2, 1))
    assert plain.size == (64, 7, 7, 512) and plain.x[0] == (64, 14, 1, 14, 256)
    assert plain.dy == ((7, 7, 64, 512), (7 * 512, 512, 49 * 512, 1)) and plain.dw == (9, 256)
    pixels = weight_plan(Conv((64, 256, 14, 14), 512, (1, 1)))
    assert pixels.size == (64 * 196, 1, 1, 512) and pixels.x[0] == (64 * 196, 1, 1, 1, 256)
    small = weight_plan(Conv((64, 16, 26, 26), 32, (3, 3)))
    assert small.windows and small.dw == (3, 48) and small.folded is None
    assert small.x == ((64, 24, 3, 24, 48), (26 * 26 * 16, 26 * 16, 26 * 16, 16, 1))
    stem = weight_plan(Conv((32, 3, 224, 224), 64, (7, 7), 2, 3))
    assert stem.windows and stem.dw == (4, 64) and stem.folded.fold == (2, 2)
    assert stem.x[0] == (32, 112, 4, 112, 64) and stem.x[1][1:] == (115 * 16, 115 * 16, 16, 1)
    patches = weight_plan(Conv((8, 3, 224, 224), 192, (16, 16), 16))
    assert patches.size == (8 * 196, 1, 1, 192) and patches.dw == (1, 768)


def test_as_many_pixels_as_the_unit_can_count():
    width = LARGEST // 16
    assert weight_plan(Conv((16, 8, 1, width), 8, (1, 3), padding=(0, 1))) is not None
    assert weight_plan(Conv((16, 8, 1, width + 1), 8, (1, 3), padding=(0, 1))) is None


@pytest.mark.parametrize("conv", WEIGHT_GRADIENTS.values(), ids=WEIGHT_GRADIENTS)
def test_plans_are_what_tma_takes_of_the_weight_gradient(conv):
    """No size is 0, every step is of 16 bytes, and the last is of one element; likewise a box."""
    for tile in weight_grad_tma.FAST_TILES[2]:
        plan = as_neighbours(weight_plan(conv), tile)
        for sizes, steps in (plan.dy, plan.x):
            assert len(sizes) == len(steps) <= 5 and min(sizes) > 0
            assert steps[-1] == 1 and not any(step % 8 for step in steps[:-1])
        how = weight_grad_tma._layout(plan, tuple(tile.items()), 132, False)
        for box in (how.dy[2], how.x[2], how.dw[2]):
            assert max(box) <= 256 and box[-1] * 2 >= 16
        (_, box_r, _, box_c) = how.x[2][1:]
        assert box_r * box_c == tile["BLOCK_N"]


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    first=st.integers(-9, 9), size=st.integers(1, 9), windows=st.integers(1, 9),
    stride=st.integers(1, 4),
)  # fmt: skip
def test_pixels_inside(first, size, windows, stride):
    want = sum(0 <= first + p * stride < size for p in range(windows))
    assert pixels_inside(first, size, windows, stride) == want


@pytest.mark.parametrize("conv", WEIGHT_GRADIENTS.values(), ids=WEIGHT_GRADIENTS)
def test_the_default_is_one_of_the_tiles_of_the_weight_gradient(conv):
    tile = weight_grad_tma.fast_tile(weight_plan(conv), HOPPER)
    assert tile | dict(SPLIT_K=1) in weight_grad_tma.FAST_TILES[2] and tile["SPLIT_K"] >= 1


def test_defaults_follow_the_shape_of_the_weight_gradient():
    def default(*conv):
        return weight_grad_tma.fast_tile(weight_plan(Conv(*conv)), HOPPER)

    large = default((256, 512, 14, 14), 512, (3, 3), 1, 1)
    assert tile_id(large) == "128x256x64" and 1 < large["SPLIT_K"] < 16
    assert default((32, 512, 14, 14), 512, (3, 3), 1, 1)["BLOCK_K"] == 32
    assert (
        tile_id(default((256, 64, 56, 56), 64, (3, 3), 1, 1)) == "128x256x64"
    )  # two pixels by four
    assert tile_id(default((32, 64, 56, 56), 64, (3, 3), 1, 1)) == "128x256x32"
    assert default((256, 64, 56, 56), 64, (3, 3), 2, 1)["BLOCK_N"] == 64
    # All 4 x 64 of a window, and two programs an SM; of few images a row of taps, whose loads are
    # ahead.
    stem = default((256, 3, 224, 224), 64, (7, 7), 2, 3)
    assert (stem["BLOCK_M"], stem["BLOCK_N"], stem["SPLIT_K"]) == (64, 256, 264)
    stem = default((32, 3, 224, 224), 64, (7, 7), 2, 3)
    assert (stem["BLOCK_M"], stem["BLOCK_N"], stem["SPLIT_K"]) == (64, 64, 66)
    one = weight_grad_tma.fast_tile(
        weight_plan(Conv((256, 512, 14, 14), 512, (3, 3), 1, 1)), Device(90, 1)
    )
    assert one["SPLIT_K"] == 1


def test_the_sum_of_dy_is_work_that_the_parts_make_room_for():
    """It is one more job for each block of filters: of 44 parts of three jobs, 33 of four."""
    plan = weight_plan(Conv((256, 64, 56, 56), 64, (3, 3), 1, 1))
    plain, more = (
        weight_grad_tma.fast_tile(plan, HOPPER),
        weight_grad_tma.fast_tile(plan, HOPPER, has_bias=True),
    )
    assert tile_id(plain) == tile_id(more) == "128x256x64"
    assert (plain["SPLIT_K"], more["SPLIT_K"]) == (44, 33)

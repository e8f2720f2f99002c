"""max_pool2d: the places of the maxima, of equal and of special values, and large windows."""

import importlib
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from tests.tools.inputs import DEVICE, DTYPES, double, gradients, laid_out, need_memory, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels.pool import _max_pool2d, _max_pool2d_backward, max_pool2d, reference

module = importlib.import_module("tilelab.kernels.pool")


def check(shape, dtype, kernel_size, stride=None, padding=0, *, x="contiguous", dy="contiguous"):
    """Forward bit by bit and the gradient against float64; `x` and `dy` name layouts."""
    window = kernel_size, stride, padding
    image = randn(*shape, dtype=dtype, layout=x)
    y64 = F.max_pool2d(double(image), *window)
    dout = randn(*y64.shape, dtype=dtype, layout=dy, seed=1)
    y, (dx,) = gradients(lambda t: max_pool2d(t, *window), [image], dout)
    _, (dx64,) = gradients(lambda t: F.max_pool2d(t, *window), [double(image)], double(dout))
    assert torch.equal(y, y64.to(dtype))  # a maximum rounds nothing
    assert torch.equal(y, reference(image, *window))
    assert y.movedim(-3, -1).is_contiguous()
    assert_close(dx, dx64, dtype=dtype, terms=9, name="dx", teeth="expanded" not in (x, dy))


# --- layouts ------------------------------------------------------------------------------------

LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset", "expanded"]


@pytest.mark.parametrize("stride", [2, (1, 2)])
def test_arguments_as_torch_takes_them(stride):
    x = randn(2, 3, 9, 7)
    want = F.max_pool2d(x, [3, 2], stride, padding=1)
    got = max_pool2d(x, kernel_size=[3, 2], stride=stride, padding=[1, 1])
    assert torch.equal(got, want)
    assert torch.equal(max_pool2d(x, 3), F.max_pool2d(x, 3))  # the stride is the window's size
    assert torch.equal(max_pool2d(x, torch.Size([3, 2])), F.max_pool2d(x, (3, 2)))


# --- nothing to do ------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4), (0, 5, 4)])
def test_empty(shape):
    dy = randn(*shape[:-2], 2, 2)
    y, (dx,) = gradients(lambda t: max_pool2d(t, 2), [randn(*shape)], dy)
    assert y.shape == dy.shape and dx.shape == shape


# --- values -------------------------------------------------------------------------------------


def pixels(taps, W, window, stride, padding):
    """Of taps, the places h*W + w in the image, as torch has them."""
    P, Q = taps.shape[2:]
    taps = taps.long()
    h = torch.arange(P, device=DEVICE)[:, None] * stride[0] - padding[0] + taps // window[1]
    w = torch.arange(Q, device=DEVICE) * stride[1] - padding[1] + taps % window[1]
    return h * W + w


def places_agree(x, kernel_size, stride, padding, dtype=torch.uint8):
    """Values and places as torch's, bit by bit."""
    pairs = [(v, v) if isinstance(v, int) else v for v in (kernel_size, stride, padding)]
    with poison(nan_results=True) as p:
        y, taps = _max_pool2d(p(x), *pairs, True)
    want, places = F.max_pool2d(x, kernel_size, stride, padding, return_indices=True)
    assert taps.dtype == dtype
    assert torch.equal(pixels(taps, x.shape[3], *pairs), places)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(7.0), want.nan_to_num(7.0))


WINDOWS = {
    "2x2": (2, 2, 0),
    "3x3 at stride 2": (3, 2, 1),
    "3x3 at stride 1": (3, 1, 1),
    "4x3, half padding": ((4, 3), (1, 2), (2, 1)),
    "5x2": ((5, 2), (3, 2), (2, 1)),
}


@pytest.mark.core
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_first_of_equal_maxima(window, layout):
    """Two different values in the image: nearly every window has several maxima."""
    x = randn(3, 5, 9, 11).sign()
    places_agree(laid_out(x, layout), *window)
    places_agree(laid_out(torch.zeros_like(x), layout), *window)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_zeros_of_either_sign_are_equal(window):
    x = torch.where(randn(3, 5, 9, 11) > 0, 0.0, -0.0)
    places_agree(x, *window)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_nan_and_infinity(window, dtype):
    """NaN wins, the last of several; a window of -inf alone has its maximum at its first pixel."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf, -1.0, 1.0])
    pick = torch.randint(0, 6, (6, 5, 9, 11), generator=torch.Generator().manual_seed(0))
    places_agree(values[pick].to(DEVICE, dtype), *window)
    for value in (-torch.inf, torch.inf, torch.nan):
        places_agree(torch.full((2, 3, 9, 11), value, dtype=dtype, device=DEVICE), *window)


@pytest.mark.core
@pytest.mark.parametrize(
    "window, dtype",
    [((16, 16), torch.uint8), ((1, 257), torch.int16), ((257, 1), torch.int16)],
    ids=["the most that a byte can number", "one more", "one more row"],
)
def test_large_windows_keep_their_taps_in_more_bytes(window, dtype):
    """The last tap of each window is its maximum, and has the largest number."""
    H, W = window[0] + 1, window[1] + 1
    x = torch.arange(float(H * W), device=DEVICE).view(1, 1, H, W)
    places_agree(x, window, 1, 0, dtype)
    dy = randn(1, 1, 2, 2)
    got = gradients(lambda t: max_pool2d(t, window, 1), [x], dy)[1][0]
    assert torch.equal(got, gradients(lambda t: F.max_pool2d(t, window, 1), [x], dy)[1][0])


def test_the_largest_windows_keep_their_taps_in_four_bytes():
    for window, dtype in [((128, 256), torch.int16), ((128, 257), torch.int32)]:
        x = torch.empty(1, 1, 300, 300, device="meta")
        assert module._empty_outputs(x, window, (1, 1), (0, 0), True)[1].dtype == dtype


@pytest.mark.core
def test_pixels_that_32_bits_cannot_number(monkeypatch):
    """They are numbered in 64: the limit is lowered for the test."""
    indices, launch = [], module.launch
    spy = lambda *args, **meta: indices.append(meta["INDEX"]) or launch(*args, **meta)  # noqa: E731
    monkeypatch.setattr(module, "launch", spy)
    check((2, 5, 9, 11), torch.float32, 3, 2, 1)
    monkeypatch.setattr(module, "MOST_INT32", 0)
    check((2, 5, 9, 11), torch.float32, 3, 2, 1)
    names = [str(index) for index in indices]
    assert names == ["int32"] * (len(names) // 2) + ["int64"] * (len(names) // 2)


def test_padding_never_wins():
    """Padding is -inf and not 0: where all pixels are negative, so is every maximum."""
    y = max_pool2d(-1 - randn(2, 3, 5, 5).abs(), 3, 1, 1)
    assert (y <= -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_numbers(dtype):
    info = torch.finfo(dtype)
    x = torch.tensor([[info.min, info.smallest_normal], [info.max, -info.tiny]], dtype=dtype)
    x = x.to(DEVICE).repeat(1, 3, 3, 3)
    assert torch.equal(max_pool2d(x, 2, 1), F.max_pool2d(x.float(), 2, 1).to(dtype))


@pytest.mark.core
def test_every_window_hands_its_whole_gradient_to_one_pixel():
    """With ties as well: whole numbers, so that sums are exact."""
    x, dy = randn(3, 5, 9, 11).sign(), (randn(3, 5, 9, 11, seed=1) * 8).round()
    _, (dx,) = gradients(lambda t: max_pool2d(t, 3, 1, 1), [x], dy)
    assert torch.equal(dx.sum((2, 3)), dy.sum((2, 3)))
    want = gradients(lambda t: F.max_pool2d(t, 3, 1, 1), [x], dy)[1][0]
    assert torch.equal(dx, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_overlapping_gradients_are_summed_in_float32(dtype):
    """One pixel is the maximum of 17 x 17 windows: 256 + 1 is 256 in bf16."""
    x = torch.zeros(1, 1, 33, 33, dtype=dtype, device=DEVICE)
    x[..., 16, 16] = 1.0
    dy = torch.ones(1, 1, 17, 17, dtype=dtype, device=DEVICE)
    dy[..., 0, 0] = 256 - 288 + 1024
    _, (dx,) = gradients(lambda t: max_pool2d(t, 17, 1), [x], dy)
    assert dx[..., 16, 16].item() == dy.double().sum().item() == 1280
    assert dx.count_nonzero() == 1


def test_infinite_gradients_stay_where_they_are():
    x, dy = randn(2, 3, 9, 7), randn(2, 3, 5, 4, seed=1)
    dy[0, 1, 2, 3], dy[1, 2, 0, 0] = torch.inf, torch.nan
    _, (dx,) = gradients(lambda t: max_pool2d(t, 3, 2, 1), [x], dy)
    assert dx.isinf().sum() == 1 and dx.isnan().sum() == 1


# --- what is kept for the backward --------------------------------------------------------------


def test_only_the_places_are_kept_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_pool2d(randn(2, 3, 8, 8).requires_grad_(), 2)
    assert [(t.dtype, list(t.shape)) for t in kept] == [(torch.uint8, [2, 3, 4, 4])]


@pytest.mark.core
def test_without_a_gradient_no_places_are_written(monkeypatch):
    saved, launch = [], module.launch
    spy = lambda *args, **meta: saved.append(meta["SAVE_TAPS"]) or launch(*args, **meta)  # noqa: E731
    monkeypatch.setattr(module, "launch", spy)
    x = randn(2, 3, 8, 8)
    want = F.max_pool2d(x, 3, 2, 1)
    with poison() as p:
        assert torch.equal(max_pool2d(p(x), 3, 2, 1), want)
    with torch.no_grad():
        assert torch.equal(max_pool2d(x.requires_grad_(), 3, 2, 1), want)
    assert saved == [False, False]


# --- torch's machinery --------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x = randn(2, 3, 9, 7, layout=layout)
    args = (3, 2), (2, 2), (1, 0)
    torch.library.opcheck(_max_pool2d, (x.clone().requires_grad_(), *args, True))
    torch.library.opcheck(_max_pool2d, (x, *args, False))
    y, index = _max_pool2d(x, *args, True)
    torch.library.opcheck(_max_pool2d_backward, (y, index, 9, 7, *args, layout != "contiguous"))


# --- anything else ------------------------------------------------------------------------------


@st.composite
def pools(draw):
    size = [draw(st.integers(1, 12)) for _ in range(2)]
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    kernel = [  # up to 12 x 12: tap 165, in a byte, looks like poison
        draw(st.integers(max(1, 2 * p), max(1, 2 * p, min(n + 2 * p, 12))))
        for n, p in zip(size, padding, strict=True)
    ]
    hypothesis.assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    stride = [draw(st.integers(1, 4)) for _ in range(2)]
    return size, kernel, stride, padding


@hypothesis.given(
    pool=pools(), batch=st.integers(1, 3), channels=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES), x=st.sampled_from(LAYOUTS), dy=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_window_layout_and_dtype(pool, batch, channels, dtype, x, dy, seed):
    """In whole numbers, so that sums are exact and many maxima are equal."""
    size, *window = pool
    image = laid_out(randn(batch, channels, *size, seed=seed).mul(2).round().to(dtype), x)
    want = F.max_pool2d(double(image), *window)
    dout = laid_out(randn(*want.shape, seed=seed + 1).mul(4).round().to(dtype), dy)
    with poison() as p:
        y, (dx,) = gradients(lambda t: max_pool2d(t, *window), [p(image)], p(dout))
    _, (dx64,) = gradients(lambda t: F.max_pool2d(t, *window), [double(image)], double(dout))
    assert torch.equal(y, want.to(dtype))
    assert torch.equal(dx, dx64.to(dtype))


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_offsets_past_2_to_the_31(layout):
    """The last images lie beyond 2^31 elements: an int32 offset would be negative."""
    shape = 700, 64, 224, 224
    assert math.prod(shape) > 2**31
    need_memory(24)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=memory).normal_()
    dy = randn(1, 64, 112, 112, dtype=torch.bfloat16, device="cuda").expand(700, -1, -1, -1)
    y, (dx,) = gradients(lambda t: max_pool2d(t, 2), [x], dy)
    for part in (slice(0, 2), slice(-2, None)):
        y64, (dx64,) = gradients(lambda t: F.max_pool2d(t, 2), [double(x[part])], double(dy[part]))
        assert torch.equal(y[part].double(), y64)
        assert torch.equal(dx[part].double(), dx64)

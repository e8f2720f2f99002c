"""scaled_matmul: its scales, all values of 8 bits, and what TMA takes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.tools.inputs import DEVICE, DTYPES, laid_out, need_memory, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab.kernels import _launch, scaled_matmul
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.scaled_matmul import FAST_TILES, TILES, fast_tile, reference

FP8, INT8 = torch.float8_e4m3fn, torch.int8
EIGHT_BIT = [FP8, INT8]
LARGEST = {FP8: 448, INT8: 127}
ON_GPU = DEVICE == "cuda"
SM80, SM90, SM100 = (Device(c, 132) for c in (80, 90, 100))
AMD = Device(0, 304)
tile_names = dict(ids=lambda t: "x".join(str(t[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K")))


def operand(*shape, dtype, layout="contiguous", seed=0):
    """Normally distributed over the range of the dtype."""
    top = LARGEST[dtype]
    x = (top / 4 * randn(*shape, seed=seed)).clamp(-top, top)
    return laid_out((x.round() if dtype == INT8 else x).to(dtype), layout)


def scale(size, kind, seed):
    """A scale for the whole tensor, or `size` of them: as a vector, strided, or as a matrix."""
    x = randn(size, seed=seed).abs() / 64 + 1 / 256
    if kind == "tensor":
        return x[0] if size else torch.tensor(0.5, device=DEVICE)
    return laid_out(x, "sliced") if kind == "sliced" else x


def widened(a, b, *rest):
    return a.double(), b.double(), *(None if x is None else x.double() for x in rest)


def check(
    M, N, K, dtype, *, a="contiguous", b="transposed", scale_a="each", scale_b="each", bias=None,
    activation=None, out=torch.bfloat16, teeth=True,
):  # fmt: skip
    """Against float64; the other arguments name layouts, and kinds of scale."""
    a = operand(M, K, dtype=dtype, layout=a)
    b = operand(K, N, dtype=dtype, layout=b, seed=1)
    scales = scale(M, scale_a, 2), scale(N, scale_b, 3)
    bias = None if bias is None else (20 * randn(N, seed=4)).to(out)
    c = scaled_matmul(a, b, *scales, bias, activation, out)
    want = reference(*widened(a, b, *scales, bias), activation)
    fp8 = ON_GPU and dtype == FP8
    assert_close(c, want, dtype=out, terms=K + 3, fp8=fp8, teeth=teeth, name="c")
    assert c.is_contiguous()
    return c


def chosen(device, a, b, dtype=torch.bfloat16):
    """The name of the kernel that a call on `device` would launch, and its tile."""
    with _launch.record(device) as events:
        scaled_matmul(a.cpu(), b.cpu(), torch.ones(()), torch.ones(()), dtype=dtype)
    choice, launch = events
    return launch.kernel.__name__, choice.tile


# --- shapes, each for a reason ------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("bias, activation", [(None, None), ("bias", None), ("bias", "relu")])
def test_epilogue(bias, activation, out):
    dtype = INT8 if out == torch.float16 else FP8
    check(33, 35, 40, dtype, bias=bias, activation=activation, out=out)


@pytest.mark.core
@pytest.mark.parametrize("scale_b", ["tensor", "each", "sliced"])
@pytest.mark.parametrize("scale_a", ["tensor", "each", "sliced"])
def test_scales(scale_a, scale_b):
    check(19, 23, 21, INT8, scale_a=scale_a, scale_b=scale_b)
    check(19, 23, 21, FP8, scale_a=scale_a, scale_b=scale_b)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_scales_as_matrices(dtype):
    """[M, 1] and [1, N], as torch._scaled_mm has them; contiguous or not they are the vectors."""
    a, b = operand(6, 32, dtype=dtype), operand(32, 8, dtype=dtype, seed=1)
    rows, columns = scale(6, "each", 2), scale(8, "each", 3)
    want = scaled_matmul(a, b, rows, columns)
    wide = torch.stack([rows, rows.flip(0)], 1)
    for rows_as in (rows[:, None], wide[:, :1]):
        assert torch.equal(scaled_matmul(a, b, rows_as, columns[None]), want)
    assert torch.equal(scaled_matmul(a, b, rows, wide.new_tensor(columns.tolist())[None]), want)


# --- values -------------------------------------------------------------------------------------

ONE = torch.ones((), device=DEVICE)


@pytest.mark.core
@pytest.mark.parametrize("tile", [TILES[0], FAST_TILES[1][3]], ids=["pointer", "tma"])
def test_int8_is_exact(tile):
    """Every value of int8, -128 too, against int64; the sums stay below 2^24, as float32 has it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (130, 512), generator=generator, dtype=INT8).to(DEVICE)
    b = torch.randint(-128, 128, (136, 512), generator=generator, dtype=INT8).to(DEVICE).t()
    with use_tile("scaled_matmul", tile):
        c = scaled_matmul(a, b, ONE, ONE, dtype=torch.float32)
    want = (a.cpu().long() @ b.cpu().long()).to(DEVICE)
    assert want.abs().max() > 2**18
    assert torch.equal(c.long(), want)


@pytest.mark.core
@pytest.mark.parametrize(
    "x, y, K", [(-128, -128, 131_071), (127, 127, 133_143), (127, -128, 132_104)]
)
def test_int8_sums_to_the_end_of_int32(x, y, K):
    """The largest sums there are, rounded to float32 once: a float32 sum would be off by far."""
    a = torch.full((1, K), x, dtype=INT8, device=DEVICE)
    b = torch.full((K, 2), y, dtype=INT8, device=DEVICE)
    b[0, 1] = 0
    want = torch.tensor([[x * y * K, x * y * (K - 1)]])
    assert 2**31 - 2**16 < want[0, 0].abs() < 2**31
    c = scaled_matmul(a, b, ONE, ONE, dtype=torch.float32)
    assert c.tolist() == want.float().tolist()


@pytest.mark.core
@pytest.mark.parametrize("out", DTYPES)
def test_every_value_of_float8(out):
    """Times one: subnormals and the largest come out as torch converts them, and NaN as NaN."""
    a = torch.arange(256, dtype=torch.uint8).view(FP8)[:, None].to(DEVICE)
    c = scaled_matmul(a, torch.ones(1, 1, device=DEVICE).to(FP8), ONE, ONE, dtype=out)
    assert c.isnan().sum() == 2
    assert torch.equal(c.nan_to_num(1e6), a.to(out).nan_to_num(1e6))


@pytest.mark.core
@pytest.mark.parametrize("tile", [TILES[0], FAST_TILES[1][3]], ids=["pointer", "tma"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_reaches_what_torch_has_it_reach(activation, tile):
    """From an operand, a scale or the bias: one row or column, and no other."""
    a, b = operand(19, 32, dtype=FP8), operand(24, 32, dtype=FP8, seed=1).t()
    scales = scale(19, "each", 2), scale(24, "each", 3)
    bias = randn(24, dtype=torch.bfloat16, seed=4)
    a[0, 3] = b[5, -1] = scales[0][4] = scales[1][6] = bias[7] = torch.nan
    with use_tile("scaled_matmul", tile):
        c = scaled_matmul(a, b, *scales, bias, activation)
    want = reference(*widened(a, b, *scales, bias), activation)
    assert want.isnan().sum() == 19 * 24 - 17 * 21
    assert_close(c, want, dtype=torch.bfloat16, terms=32, fp8=ON_GPU)


def test_infinities():
    """A result that overflows, and a scale of infinity: 0 times it is NaN."""
    a = torch.tensor([[100, 0]], dtype=INT8, device=DEVICE)
    b = torch.eye(2, dtype=INT8, device=DEVICE) * 100
    c = scaled_matmul(a, b, 7 * ONE, ONE, dtype=torch.float16)
    assert c.tolist() == [[torch.inf, 0.0]]
    c = scaled_matmul(a, b, torch.inf * ONE, -ONE)
    assert c[0, 0] == -torch.inf and c[0, 1].isnan()


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_relu_at_exactly_zero(dtype):
    a = torch.tensor([[-1.0], [0.0], [1.0]], device=DEVICE).to(dtype)
    one = torch.ones(1, 1, device=DEVICE).to(dtype)
    assert scaled_matmul(a, one, ONE, ONE, None, "relu").flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_nearest_even(out):
    """One, plus half of its last place exactly (to even: down), or a little more (up)."""
    ulp = torch.finfo(out).eps
    a = torch.tensor([[0, 64], [1, 64], [0, 127]], dtype=INT8, device=DEVICE)
    b = torch.tensor([[1], [127]], dtype=INT8, device=DEVICE)
    exact = a.long().cpu() @ b.long().cpu()
    one = torch.tensor(1 / exact[0].item(), device=DEVICE)
    assert scaled_matmul(a[:1], b, one, ONE, dtype=out).item() == 1.0
    halves = torch.tensor([[2], [3]], dtype=INT8, device=DEVICE)  # of a last place, beyond one
    bias = torch.ones(1, dtype=out, device=DEVICE)
    one = torch.ones(1, 1, dtype=INT8, device=DEVICE)
    c = scaled_matmul(halves - 1, one, torch.tensor(ulp / 2, device=DEVICE), ONE, bias, dtype=out)
    assert c.flatten().tolist() == [1.0, 1.0 + ulp]


# --- which kernel -------------------------------------------------------------------------------


def matrices(M=96, N=64, K=128, dtype=INT8):
    return torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype).t()


TAKEN = {  # by TMA
    "int8": (*matrices(), torch.bfloat16),
    "float8": (*matrices(dtype=FP8), torch.float16),
    "float32 results": (*matrices(N=68), torch.float32),
    "one row": (*matrices(M=1), torch.bfloat16),
    "K of 16": (*matrices(K=16), torch.bfloat16),
    "columns of a wider A": (matrices(K=256)[0][:, 128:], matrices()[1], torch.bfloat16),
    "rows of a larger A": (matrices(M=300)[0][3:99], matrices()[1], torch.bfloat16),
    "columns of a larger B": (matrices()[0], matrices(N=300)[1][:, 5:69], torch.bfloat16),
}
LEFT = {  # to the pointer kernel
    "B row-major": (matrices()[0], torch.empty(128, 64, dtype=INT8), torch.bfloat16),
    "A column-major": (torch.empty(128, 96, dtype=INT8).t(), matrices()[1], torch.bfloat16),
    "A unaligned": (laid_out(matrices()[0], "offset"), matrices()[1], torch.bfloat16),
    "B unaligned": (matrices()[0], laid_out(matrices()[1].t(), "offset").t(), torch.bfloat16),
    "rows of A 24 apart": (*matrices(K=24), torch.bfloat16),
    "rows of A 200 apart": (matrices(K=200)[0][:, :128], matrices()[1], torch.bfloat16),
    "columns of B 200 apart": (matrices()[0], matrices(K=200)[1][:128], torch.bfloat16),
    "every second column of A": (matrices(K=256)[0][:, ::2], matrices()[1], torch.bfloat16),
    "one row of A for all": (matrices()[0][:1].expand(96, 128), matrices()[1], torch.bfloat16),
    "one column of B for all": (
        matrices()[0], matrices()[1][:, :1].expand(128, 64), torch.bfloat16
    ),
    "rows of C 136 bytes": (*matrices(N=68), torch.bfloat16),
    "K of 0": (*matrices(K=0), torch.bfloat16),
}  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("a, b, out", TAKEN.values(), ids=TAKEN)
def test_what_tma_takes(a, b, out):
    assert chosen(SM90, a, b, out)[0] == "scaled_matmul_tma_kernel"
    if a.dtype == INT8:
        assert chosen(SM80, a, b, out)[0] == chosen(AMD, a, b, out)[0] == "scaled_matmul_kernel"


@pytest.mark.core
@pytest.mark.parametrize("a, b, out", LEFT.values(), ids=LEFT)
def test_what_is_left_to_pointers(a, b, out):
    hopper, ampere = chosen(SM90, a, b, out), chosen(SM80, a, b, out)
    assert hopper[0] == ampere[0] == "scaled_matmul_kernel"
    turned = a.stride(1) != 1 or b.stride(0) != 1  # what wgmma would have to turn
    assert (hopper[1]["num_warps"] == 2) == turned  # with four and more, wgmma turns them
    with pytest.raises(ValueError, match="the tma kernel of scaled_matmul cannot take these"):
        with use_tile("scaled_matmul", FAST_TILES[1][0]):
            scaled_matmul(a.to(DEVICE), b.to(DEVICE), ONE, ONE, dtype=out)


@pytest.mark.parametrize("device", [SM80, AMD], ids=["sm_80", "AMD"])
def test_float8_is_refused_where_the_gpu_lacks_it(device):
    a, b = matrices(dtype=FP8)
    with _launch.record(device) as events:
        with pytest.raises(TypeError, match="a must be int8 on this GPU: float8_e4m3fn is what"):
            scaled_matmul(a, b, torch.ones(()), torch.ones(()))
        assert not events  # nor was anything launched
    with _launch.record(Device(89, 128)) as events:
        scaled_matmul(a, b, torch.ones(()), torch.ones(()))
    assert events


def test_tiles_by_shape():
    def blocks(device, *shape, dtype=INT8):
        tile = chosen(device, *matrices(*shape, dtype=dtype))[1]
        return tile["BLOCK_M"], tile["BLOCK_N"]

    assert blocks(SM90, 4096, 4096, 4096) == (128, 256)
    assert blocks(SM90, 512, 1024, 4096) == (64, 128)  # 64 tiles instead of 16
    assert blocks(SM100, 4096, 4096, 4096, dtype=FP8) == (128, 256)
    assert fast_tile(4096, 4096, 4096, "fp8", "tma", SM90)["BLOCK_N"] == 256
    for K in (1, 16, 33):  # tensor cores take 32 bytes along K, at least
        assert chosen(SM80, *matrices(K=K))[1]["BLOCK_K"] >= 32


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype, out", [(FP8, torch.bfloat16), (INT8, torch.float32)])
@pytest.mark.parametrize("tile", FAST_TILES[1], **tile_names)
def test_every_fast_tile_alone(tile, dtype, out):
    """The same; four tiles are two turns of the interpreter's two programs. Bits as by pointers."""
    M, N, K = (tile[f"BLOCK_{d}"] + rest for d, rest in dict(M=5, N=8, K=16).items())
    args = dict(bias="bias", activation="relu", out=out)
    with use_tile("scaled_matmul", tile):
        c = check(M, N, K, dtype, **args)
    with use_tile("scaled_matmul", TILES[0]):
        by_pointers = check(M, N, K, dtype, **args)
    if dtype == INT8:
        assert torch.equal(c, by_pointers)


@pytest.mark.parametrize("per_sm", [0, 1, 2])
@pytest.mark.parametrize("blocks", [(1, 1), (9, 1), (1, 5), (9, 3)], ids=str)
def test_every_program_order_visits_every_tile(blocks, per_sm):
    tile = FAST_TILES[1][3] | dict(
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, GROUP_M=4, PROGRAMS_PER_SM=per_sm
    )
    a = operand(16 * blocks[0] - 3, 48, dtype=INT8)
    b = operand(16 * blocks[1] - 8, 48, dtype=INT8, seed=1).t()
    with use_tile("scaled_matmul", tile), poison() as p:
        c = scaled_matmul(p(a), p(b), ONE, ONE, dtype=torch.float32)
    assert torch.equal(c.double(), a.double() @ b.double())


# --- anything else ------------------------------------------------------------------------------

sizes = st.integers(1, 70)
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
kinds_of_scale = st.sampled_from(["tensor", "each", "sliced"])


def integers(*shape, dtype, seed, low=-3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 4, shape, generator=generator).to(DEVICE, torch.float32).to(dtype)


@hypothesis.given(
    M=sizes, N=sizes, K=st.integers(0, 70), dtype=st.sampled_from(EIGHT_BIT), a=layouts, b=layouts,
    scale_a=kinds_of_scale, scale_b=kinds_of_scale, with_bias=st.booleans(),
    activation=st.sampled_from([None, "relu"]), out=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_anything(M, N, K, dtype, a, b, scale_a, scale_b, with_bias, activation, out, seed):
    """In small integers and scales of 1, 2 and 4, so that only the results are rounded."""
    a = laid_out(integers(M, K, dtype=dtype, seed=seed), a)
    b = laid_out(integers(K, N, dtype=dtype, seed=seed + 1), b)
    scales = [
        2.0 ** integers(*([n] if kind != "tensor" else []), dtype=torch.float32, seed=seed, low=0)
        for n, kind in ((M, scale_a), (N, scale_b))
    ]
    scales = [
        laid_out(x, "sliced") if kind == "sliced" else x
        for x, kind in zip(scales, (scale_a, scale_b), strict=True)
    ]
    bias = integers(N, dtype=out, seed=seed + 2) if with_bias else None
    with poison() as p:
        rest = [x if x is None or not x.dim() else p(x) for x in (*scales, bias)]
        c = scaled_matmul(p(a), p(b), *rest, activation, out)
    want = reference(*widened(a, b, *scales, bias), activation)
    assert c.dtype == out
    assert torch.equal(c, want.to(out))


# --- wrong input --------------------------------------------------------------------------------


def test_a_twin_leaves_the_storage_around_a_float8_tensor_as_it_is():
    """The interpreter computes on float32 twins: what it was not asked to write keeps its bits."""
    storage = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    before = storage.clone()
    a = storage.view(FP8)[16:48].view(2, 16)
    b = storage.view(FP8)[64:96].view(2, 16).t()
    scaled_matmul(a, b, ONE, ONE)
    assert torch.equal(storage, before)


# --- on a GPU, at real sizes --------------------------------------------------------------------


def need_float8(dtype):
    if dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8_e4m3fn")


@pytest.mark.gpu
def test_as_torch_scales_rows():
    need_float8(FP8)
    a, b = operand(512, 1024, dtype=FP8), operand(768, 1024, dtype=FP8, seed=1).t()
    scales = scale(512, "each", 2)[:, None], scale(768, "each", 3)[None]
    theirs = torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    want = reference(*widened(a, b, *scales))
    for c in (theirs, scaled_matmul(a, b, *scales)):
        assert_close(c, want, dtype=torch.bfloat16, terms=1024, fp8=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_offsets_past_2_to_the_31(layout):
    """The last rows lie beyond 2^31 elements: an int32 offset would be negative."""
    need_memory(12)
    M, N, K = 46_400, 48, 46_400
    a = torch.randint(-9, 10, (M, K), device="cuda", dtype=INT8)
    if layout == "transposed":
        a = a.t()
    b = torch.randint(-9, 10, (N, K), device="cuda", dtype=INT8).t()
    c = scaled_matmul(a, b, ONE, ONE, dtype=torch.float32)
    assert torch.equal(c[-40:].double(), a[-40:].double() @ b.double())

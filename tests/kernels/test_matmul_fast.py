"""matmul's kernel for Hopper: it agrees with the portable one, and is chosen where it can be.

Here it runs in the interpreter, or on this machine's GPU. What it compiles to is held to its bars
in test_compile.py.
"""

import importlib
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tilelab.kernels import _launch, _tiles, matmul
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.matmul import TILES, reference
from tilelab.kernels.matmul_tma import FAST_TILES, fast_tile

from tests.kernels.test_matmul import check, integers
from tests.tools.inputs import DEVICE, double, gradients, laid_out, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close

HOPPER, AMPERE = Device(90, sms=132), Device(80, sms=108)
HALF = [torch.float16, torch.bfloat16]
SMALL = FAST_TILES[2][0] | dict(
    BLOCK_M=64, BLOCK_N=128, num_warps=4
)  # for tests of everything else


def name(tile):
    blocks = "x".join(str(tile[f"BLOCK_{d}"]) for d in "MNK")
    return f"{tile['kernel']} {blocks} s{tile['num_stages']}"


@pytest.fixture
def tf32(monkeypatch):
    """float32 products that may be TF32, without which they are not for this kernel."""
    module = importlib.import_module("tilelab.kernels.matmul")  # `kernels.matmul` is the function
    monkeypatch.setattr(module, "dot_precision", lambda dtype, switch: "tf32")


# Two tiles and a remainder along M and N, and a remainder of K's last step.
def problem(tile, dtype, a="contiguous", b="contiguous"):
    M, N, K = tile["BLOCK_M"] + 8, tile["BLOCK_N"] + 8, tile["BLOCK_K"] + 8
    a, b = (laid_out(integers(*s, dtype=dtype), x) for s, x in (((M, K), a), ((K, N), b)))
    return a, b, integers(N, dtype=dtype, seed=2)


# --- the same results -----------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("a", ["contiguous", "transposed"])
@pytest.mark.parametrize("b", ["contiguous", "transposed"])
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
def test_both_kernels_agree_to_the_last_bit(tile, a, b):
    """In small integers every sum is exact, in whatever order it is taken."""
    for dtype in HALF:
        inputs = problem(tile, dtype, a, b)
        with use_tile("matmul", TILES[0]):
            portable = matmul(*inputs, "relu")
        with use_tile("matmul", tile):
            fast = matmul(*inputs, "relu")
        assert torch.equal(fast, portable) and fast.is_contiguous()
        assert portable.count_nonzero() > portable.numel() / 4


@pytest.mark.core
@pytest.mark.parametrize("tile", FAST_TILES[4], ids=name)
def test_tf32_tiles_agree_too(tile, tf32):
    inputs = problem(tile, torch.float32, b="transposed")
    with use_tile("matmul", tile):
        assert torch.equal(matmul(*inputs), reference(*double(*inputs)).float())


@pytest.mark.core
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
def test_forward_and_gradients_against_float64(tile, dtype):
    """The gradients are products of transposed operands: all four layouts, by this kernel."""
    with use_tile("matmul", tile):
        check(72, 136, 200, dtype, bias="contiguous", activation="relu")
        check(72, 136, 200, dtype, a="transposed", b="transposed", dc="transposed")


@pytest.mark.core
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("K", [8, 64, 200, 640])
@pytest.mark.parametrize("split", [1, 2, 3, 5, 16])
def test_parts_of_k(split, K, dtype):
    """Parts that divide nothing, and some that are left with nothing to add."""
    a, b = integers(72, K, dtype=dtype), integers(K, 136, dtype=dtype, seed=1)
    bias = integers(136, dtype=dtype, seed=2)
    with use_tile("matmul", SMALL | dict(SPLIT_K=split)):
        c = matmul(a, b, bias, "relu")
    assert torch.equal(c, reference(*double(a, b, bias), "relu").to(dtype))


@pytest.mark.parametrize("GROUP_M", [1, 2, 8])
@pytest.mark.parametrize("per_sm", [0, 1, 2])
@pytest.mark.parametrize("blocks", [(1, 1), (5, 1), (1, 3), (3, 2)], ids=str)
def test_every_program_does_its_share(blocks, per_sm, GROUP_M):
    """One program a tile, or a few that take turns: each tile is computed, and once."""
    M, N = 64 * blocks[0] - 3, 128 * blocks[1] - 8
    a, b = randn(M, 72, dtype=torch.float16), randn(72, N, dtype=torch.float16, seed=1)
    tile = SMALL | dict(PROGRAMS_PER_SM=per_sm, GROUP_M=GROUP_M)
    with use_tile("matmul", tile), poison() as p:
        c = matmul(p(a), p(b))
    assert_close(c, reference(*double(a, b)), dtype=torch.float16, terms=72)
    with use_tile("matmul", tile), _launch.record(Device(90, sms=2)) as events:
        matmul(a, b)
    tiles = blocks[0] * blocks[1]
    assert events[-1].grid == (min(tiles, 2 * per_sm) if per_sm else tiles,)


@pytest.mark.core
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
def test_nothing_is_read_or_written_out_of_bounds(tile, split):
    if split > 1 and (tile["kernel"] == "tma_ws" or tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128):
        pytest.skip("warp-specialised tiles do not split K; others' float32 tiles would not fit")
    for layout in ("contiguous", "transposed"):
        inputs = problem(tile, torch.bfloat16, layout, layout)
        with use_tile("matmul", tile | dict(SPLIT_K=split)), poison() as p:
            matmul(*(p(x) for x in inputs), "relu")


@pytest.mark.parametrize("split", [1, 4])
def test_the_same_bits_twice(split):
    inputs = [randn(72, 520, dtype=torch.bfloat16), randn(520, 136, dtype=torch.bfloat16, seed=1)]
    dc = randn(72, 136, dtype=torch.bfloat16, seed=2)
    with use_tile("matmul", SMALL | dict(SPLIT_K=split)):
        first, second = (gradients(matmul, inputs, dc) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(g, h) for g, h in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_go_where_torch_has_them(value, activation):
    a, b = randn(72, 72, dtype=torch.float16), randn(72, 136, dtype=torch.float16, seed=1)
    a[70, 71] = value  # in the rows and the step that are not whole
    with use_tile("matmul", SMALL):
        c = matmul(a, b, None, activation)
    torch.testing.assert_close(
        c.double(), reference(*double(a, b), None, activation), equal_nan=True, atol=0.1, rtol=0.01
    )


eights = st.integers(1, 40).map(lambda n: 8 * n)


@hypothesis.given(
    M=st.integers(1, 200), N=eights, K=eights, dtype=st.sampled_from(HALF),
    tile=st.sampled_from([t for t in FAST_TILES[2] if t["BLOCK_M"] * t["BLOCK_N"] <= 128 * 128]),
    split=st.integers(1, 4), a=st.sampled_from(["contiguous", "transposed"]),
    b=st.sampled_from(["contiguous", "transposed"]), with_bias=st.booleans(),
    activation=st.sampled_from([None, "relu"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(M, N, K, dtype, tile, split, a, b, with_bias, activation, seed):
    M = M if a == "contiguous" else 8 * (M // 8 + 1)  # the rows of A^T must be aligned
    inputs = [integers(M, K, dtype=dtype, seed=seed), integers(K, N, dtype=dtype, seed=seed + 1)]
    inputs = [laid_out(x, layout) for x, layout in zip(inputs, (a, b), strict=True)]
    inputs.append(integers(N, dtype=dtype, seed=seed + 2) if with_bias else None)
    split = 1 if tile["kernel"] == "tma_ws" else split
    with use_tile("matmul", tile | dict(SPLIT_K=split)):
        c = matmul(*inputs, activation)
    assert torch.equal(c, reference(*double(*inputs), activation).to(dtype))


# --- which kernel ---------------------------------------------------------------------------------


def half(*shape):
    return randn(*shape, dtype=torch.bfloat16)


BORDERS = {  # operands, and the kernel that a Hopper GPU takes for them
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


def chosen(a, b, device):
    """The kind of the kernel that a call would launch; None for no launch."""
    with _launch.record(device) as events:
        matmul(a, b)
    launches = [event for event in events if isinstance(event, _launch.Launch)]
    kinds_of = {"matmul_kernel": "pointer", "matmul_tma_kernel": "tma"}
    return kinds_of[launches[0].kernel.__name__] if launches else None


@pytest.mark.parametrize("operands, kernel", BORDERS.values(), ids=BORDERS)
def test_what_tma_cannot_read_goes_through_pointers(operands, kernel):
    a, b = operands()
    assert chosen(a, b, HOPPER) == kernel
    if kernel is not None:
        assert chosen(a, b, AMPERE) == "pointer"
    if kernel == "tma":
        with use_tile("matmul", SMALL):
            c = matmul(a, b)
    else:
        with use_tile("matmul", SMALL), pytest.raises(ValueError, match="cannot take these"):
            matmul(a, b)
        c = matmul(a, b)
    want = reference(*double(a, b))
    assert c.shape == want.shape
    torch.testing.assert_close(c.double(), want, atol=0.3, rtol=0.02)


def test_tf32_takes_it_for_operands_along_k_alone(tf32):
    a, b = randn(64, 64), randn(128, 64, seed=1)
    assert chosen(a, b.t(), HOPPER) == "tma"
    assert chosen(a, b.t().contiguous(), HOPPER) == "pointer"
    assert chosen(a.t(), b.t(), HOPPER) == "pointer"


def test_kinds_of_kernels():
    def kinds(capability):
        return Device(capability, sms=1).kernels

    assert kinds(80) == kinds(89) == kinds(0) == ("pointer",)
    assert kinds(90) == ("pointer", "tma", "tma_ws")
    assert kinds(100) == kinds(120) == ("pointer", "tma")


@pytest.mark.parametrize("item", FAST_TILES)
@pytest.mark.parametrize(
    "M, N, K", [(8192, 8192, 8192), (1, 8, 8), (64, 64, 65536), (256, 256, 65536), (100, 16, 24)]
)
def test_the_default_is_a_tile_of_the_list(M, N, K, item):
    tile = fast_tile(M, N, K, item, 132)
    assert tile | dict(SPLIT_K=1) in FAST_TILES[item] and tile["kernel"] == "tma"
    assert tile["SPLIT_K"] == 1 or tile["SPLIT_K"] * 4 * tile["BLOCK_K"] <= K


def test_defaults_follow_the_shape():
    assert fast_tile(8192, 8192, 8192, 2, 132)["BLOCK_N"] == 256
    assert fast_tile(8192, 8192, 8192, 2, 132)["SPLIT_K"] == 1
    assert fast_tile(1, 4096, 4096, 2, 132)["BLOCK_M"] == 64
    assert fast_tile(256, 256, 65536, 2, 132)["SPLIT_K"] >= 8
    small = fast_tile(1024, 1024, 512, 2, 132)  # 32 tiles of 128x256 would leave 100 SMs idle
    assert small["BLOCK_M"] * small["BLOCK_N"] <= 128 * 128


def test_the_tuned_table_may_name_either_kernel(monkeypatch, tmp_path):
    """The nearest tile of a kernel that can take the operands; others are passed over."""
    fast, portable = SMALL, TILES[2]
    entries = [
        dict(op="matmul", dtype="bfloat16", sizes=dict(M=64, N=128, K=64), tile=fast),
        dict(op="matmul", dtype="bfloat16", sizes=dict(M=9999, N=9999, K=9999), tile=portable),
    ]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(dict(tiles=entries)))
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_tiles, "_tuned", lambda device: _tiles.read_tuned(path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def tile(kernels):
        default = {2: TILES[0]}
        return _tiles.choose_tile("matmul", torch.bfloat16, default, kernels, M=64, N=128, K=64)

    assert tile(("pointer", "tma", "tma_ws")) == fast
    assert tile(("pointer",))["BLOCK_N"] == min(128, portable["BLOCK_N"])
    assert "kernel" not in tile(("pointer",))


def test_descriptors_say_what_tritons_own_constructor_says():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = half(64, 96)
    mine = _launch.descriptor(x, x.shape, (96, 1), [16, 32])
    theirs = TensorDescriptor.from_tensor(x, [16, 32])
    for field in TensorDescriptor.__dataclass_fields__:
        got, want = getattr(mine, field), getattr(theirs, field)
        assert got is want if field == "base" else (got == want or tuple(got) == tuple(want)), field


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("tile", FAST_TILES[2], ids=name)
@pytest.mark.parametrize("dtype", HALF)
def test_every_fast_tile_at_real_size(tile, dtype, layout, device):
    """Every program takes several turns, and what 3.6.0 could race for in registers would show."""
    if tile["kernel"] not in _launch.device_of(torch.empty(1, device=DEVICE)).kernels:
        pytest.skip(f"this GPU has no {tile['kernel']} kernels")
    a, b = randn(2056, 1032, dtype=dtype, layout=layout), randn(1032, 4104, dtype=dtype, seed=1)
    b = laid_out(b, layout)
    for splits in (1, 3) if tile["kernel"] == "tma" and tile["BLOCK_N"] == 128 else (1,):
        with use_tile("matmul", tile | dict(SPLIT_K=splits)):
            first, second = matmul(a, b), matmul(a, b)
        assert torch.equal(first, second)
        assert_close(first, reference(*double(a, b)), dtype=dtype, terms=1032)

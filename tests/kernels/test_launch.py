"""_launch.py and _rows.py: where kernels run, what they refuse, which tile they get."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl

from tests.tools.inputs import DEVICE, DTYPES, INTERPRET, double, gradients, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close
from tilelab import kernels
from tilelab.kernels import _launch, _tiles, matmul
from tilelab.kernels._checks import check_choice, check_shape, check_tensors, dot_precision, pair
from tilelab.kernels._launch import launch, refuse_broken_versions, warn_of_missing_fences
from tilelab.kernels._partial_sums import sum_partials
from tilelab.kernels._rows import as_rows
from tilelab.kernels._tiles import (
    part_count,
    persistent,
    read_tuned,
    tuned_path,
    use_tile,
)

ROOT = pathlib.Path(kernels.__file__).parents[1]
interpreter_only = pytest.mark.skipif(not INTERPRET, reason="how the interpreter is fed")


def python(code, **env):
    """Run `code` in a process of its own; a value of None removes a variable."""
    env = {k: v for k, v in (os.environ | env).items() if v is not None}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


# --- where kernels run --------------------------------------------------------------------------


MODE = "from tilelab.kernels import _launch; print(_launch.INTERPRET)"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without one")


@pytest.mark.core
@without_gpu
def test_interpreted_where_there_is_no_gpu():
    result = python(MODE, TRITON_INTERPRET=None)
    assert (result.stdout, result.stderr) == ("True\n", "")


@pytest.mark.gpu
@pytest.mark.parametrize("variable, expected", [(None, "False"), ("1", "True")])
def test_compiled_where_there_is_a_gpu(variable, expected):
    assert python(MODE, TRITON_INTERPRET=variable).stdout == f"{expected}\n"


@pytest.mark.core
def test_compiled_kernels_refuse_cpu_tensors():
    code = "import torch; from tilelab.kernels import matmul; matmul(*[torch.ones(2, 2)] * 2)"
    result = python(MODE + "; " + code, TRITON_INTERPRET="0")
    assert result.stdout == "False\n"
    assert "TypeError: a is on cpu, but the kernels are compiled for the GPU" in result.stderr
    assert "TRITON_INTERPRET=1" in result.stderr


@pytest.mark.core
@without_gpu
def test_triton_imported_first_is_refused():
    """`@triton.jit` has chosen the compiler by then, and kernels cannot be interpreted."""
    result = python("import triton, tilelab.kernels", TRITON_INTERPRET=None)
    assert "ImportError: triton was imported before tilelab.kernels" in result.stderr


@pytest.mark.core
def test_import_prints_nothing_and_launches_nothing():
    """Here triton may come first: the environment has told it the mode."""
    code = """
import triton.runtime.interpreter as interpreter
import triton
def launched(*args, **kwargs):
    raise SystemExit("launched")
interpreter.GridExecutor.__call__ = triton.JITFunction.run = triton.compile = launched
from tilelab import kernels
"""
    result = python(code, TRITON_INTERPRET="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("package", ["kernels", "nets"])
def test_checks_survive_python_O(package):
    """`python -O` removes asserts, so none of them may be what refuses wrong input."""
    for path in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}, line {node.lineno}: raise instead"


@pytest.mark.parametrize(
    "triton_version, numpy_version, interpret, message",
    [
        ("3.5.1", "2.0.0", False, "needs triton >= 3.6, found 3.5.1"),
        ("2.3.0+git1234", "1.26", True, "needs triton >= 3.6"),
        ("3.6.0", "2.4.0", True, "'triton>=3.7.1', or keep this triton .* 'numpy<2.4'"),
        ("3.7.0", "2.4.6", True, "3.7.0's interpreter fails on loops with NumPy 2.4.6"),
        ("3.6.0", "3.0.0", True, "fails on loops"),
        ("3.6.0", "2.3.5", True, None),
        ("3.6.0", "2.4.0", False, None),  # compiled kernels do not care about NumPy
        ("3.7.1", "2.4.0", True, None),
        ("3.10.0", "2.10.0", True, None),  # versions are numbers and not text
        ("3.9.0+cu130", "2.4.0rc1", True, None),
        ("4.0", "3", True, None),
    ],
)
def test_versions(triton_version, numpy_version, interpret, message):
    if message is None:
        refuse_broken_versions(triton_version, numpy_version, interpret)
    else:
        with pytest.raises(ImportError, match=message):
            refuse_broken_versions(triton_version, numpy_version, interpret)


def test_a_triton_that_leaves_out_fences_on_hopper_is_named(recwarn):
    for version, capability in (("3.6.0", 80), ("3.7.1", 90), ("3.9.0", 90), ("3.6.0", 100)):
        warn_of_missing_fences(version, capability)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match="triton 3.6.0 leaves out a fence on Hopper"):
        warn_of_missing_fences("3.6.0", 90)


# --- checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, minimum, expected",
    [(3, 0, (3, 3)), ((1, 2), 1, (1, 2)), ([0, 2], 0, (0, 2)), (torch.Size([4, 5]), 1, (4, 5))],
)
def test_pair(value, minimum, expected):
    assert pair("stride", value, minimum) == expected


@pytest.mark.parametrize(
    "value, error",
    [
        (1.0, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError),
        ((1, 2, 3), TypeError), ((1,), TypeError), ((1, 2.0), TypeError), ((True, 1), TypeError),
        (torch.tensor([1, 1]), TypeError), (0, ValueError), (-1, ValueError), ((1, 0), ValueError),
    ],
)  # fmt: skip
def test_pair_refuses(value, error):
    with pytest.raises(error, match="stride must be .*, got"):
        pair("stride", value, 1)


def test_check_tensors():
    x = torch.ones(2, device=DEVICE)
    check_tensors(x=x, bias=None, optional=("bias",))
    check_tensors(x=torch.nn.Parameter(x), y=x)
    for tensors in [dict(x=None), dict(x=x, bias=None), dict(x=1), dict(x=x, y=x.double())]:
        with pytest.raises(TypeError, match="^(x|y|bias) must be .*, got"):
            check_tensors(**tensors)


@pytest.mark.parametrize(
    "shape, message",
    [
        ([2, 4], None),
        ([2, 3], r"w must have shape \[A, B\] with B=4, got \[2, 3\]"),
        ([4], r"w must have shape \[A, B\] with B=4, got \[4\]"),
        ([], r"got \[\]"),
        ([2, 4, 1], r"got \[2, 4, 1\]"),
    ],
)
def test_check_shape(shape, message):
    if message is None:
        check_shape("w", torch.ones(shape), "[A, B]", A=None, B=4)
    else:
        with pytest.raises(ValueError, match=message):
            check_shape("w", torch.ones(shape), "[A, B]", A=None, B=4)


def test_check_choice():
    check_choice("reduction", "mean", ("none", "mean"))
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', got 'average'"):
        check_choice("reduction", "average", ("none", "mean"))


# --- torch's switches ---------------------------------------------------------------------------


@pytest.fixture
def switches():
    """torch's float32 switches, put back afterwards."""
    places = [torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [place.fp32_precision for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


@pytest.mark.core
@pytest.mark.parametrize(
    "place, old",
    [(torch.backends.cuda.matmul,) * 2, (torch.backends.cudnn.conv, torch.backends.cudnn)],
)
def test_dot_precision_follows_torch(place, old, switches):
    for allow in (True, False, True):
        old.allow_tf32 = allow
        assert dot_precision(torch.float32, place) == ("tf32" if allow else "ieee")
        assert dot_precision(torch.float16, place) == "ieee"
    for precision in ("ieee", "tf32"):
        place.fp32_precision = precision
        assert dot_precision(torch.float32, place) == precision
        assert dot_precision(torch.bfloat16, place) == "ieee"


def test_dot_precision_follows_torchs_matmul_precision(switches):
    before = torch.get_float32_matmul_precision()
    for name, expected in [("high", "tf32"), ("highest", "ieee")]:
        torch.set_float32_matmul_precision(name)
        assert dot_precision(torch.float32, torch.backends.cuda.matmul) == expected
    torch.set_float32_matmul_precision(before)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """As torch's matmul under autocast: computed in its dtype, with gradients in float32."""
    inputs, dc = [randn(20, 30), randn(30, 40, seed=1), randn(40, seed=2)], randn(20, 40, seed=3)
    with torch.autocast(DEVICE, dtype):
        c, grads = gradients(matmul, inputs, dc.to(dtype))
    rounded = [x.to(dtype) for x in inputs]
    want, want_grads = gradients(matmul, rounded, dc.to(dtype))
    assert c.dtype == dtype and torch.equal(c, want)
    for got, expected in zip(grads, want_grads, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected.float())
    with torch.autocast(DEVICE, dtype, enabled=False):
        assert matmul(*inputs).dtype == torch.float32


def test_autocast_does_not_make_wrong_dtypes_right():
    with torch.autocast(DEVICE, torch.bfloat16):
        for dtype in (torch.float64, torch.int64):
            x = torch.ones(2, 2, dtype=dtype, device=DEVICE)
            with pytest.raises(TypeError, match="a must be float32"):
                matmul(x, x)


# --- tiles --------------------------------------------------------------------------------------

TILE = dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=4)
DEFAULT = {2: TILE, 4: TILE | dict(BLOCK_M=64)}


@pytest.fixture
def gpu(monkeypatch):
    """choose_tile as on a GPU, which has been tuned as the returned table says."""
    table = {}
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "_name", lambda index: "Some GPU")
    monkeypatch.setattr(_tiles, "_tuned", lambda gpu: table)
    return table


def choose_tile(op, dtype, *more, **sizes):
    return _tiles.choose_tile(op, torch.empty(0, dtype=dtype), *more, **sizes)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (dict(M=4096, N=4096, K=4096), (128, 64, 32)),
        (dict(M=100, N=4096, K=4096), (128, 64, 32)),  # 128 covers 100
        (dict(M=64, N=4096, K=4096), (64, 64, 32)),
        (dict(M=4096, N=10, K=4096), (128, 16, 32)),  # not below 16, for tensor cores
        (dict(M=1, N=1, K=1), (16, 16, 16)),
        (dict(M=0, N=0, K=0), (16, 16, 16)),
        (dict(M=4096, N=33, K=17), (128, 64, 32)),
    ],
)
def test_default_tile_shrinks_to_the_size(sizes, expected, gpu):
    tile = choose_tile("op", torch.float16, DEFAULT, **sizes)
    assert tuple(tile[f"BLOCK_{k}"] for k in "MNK") == expected
    assert tile["num_warps"] == 4
    assert TILE["BLOCK_M"] == 128, "the default itself was changed"


def test_default_tile_depends_on_the_element_size(gpu):
    sizes = dict(M=999, N=999, K=999)
    assert choose_tile("op", torch.bfloat16, DEFAULT, **sizes)["BLOCK_M"] == 128
    assert choose_tile("op", torch.float32, DEFAULT, **sizes)["BLOCK_M"] == 64


def test_tuned_tile_of_the_nearest_shape(gpu, tmp_path):
    def entry(op, dtype, M, block, **tile):
        sizes = dict(M=M, N=1024, K=1024)
        return dict(op=op, dtype=dtype, sizes=sizes, tile=TILE | dict(BLOCK_M=block) | tile)

    path = tmp_path / "some-gpu.json"
    entries = [
        entry("matmul", "float16", 1024, 32, num_warps=8),
        entry("matmul", "float16", 8192, 256),
        entry("matmul", "bfloat16", 8192, 16),
        entry("conv2d", "float16", 1024, 16),
    ]
    path.write_text(json.dumps({"tiles": entries}))
    gpu |= read_tuned(path)

    def block(op, dtype, M):
        return choose_tile(op, dtype, DEFAULT, M=M, N=1024, K=1024)["BLOCK_M"]

    assert block("matmul", torch.float16, 1024) == 32
    assert block("matmul", torch.float16, 2000) == 32  # 1 octave from 1024, 2 from 8192
    assert block("matmul", torch.float16, 4000) == 256
    assert block("matmul", torch.float16, 1_000_000) == 256
    assert block("matmul", torch.float16, 20) == 32
    assert block("matmul", torch.bfloat16, 1024) == 16  # the nearest of its dtype
    assert block("conv2d", torch.float16, 1024) == 16
    assert block("matmul", torch.float32, 1024) == 64  # nobody tuned float32: the default
    assert block("other", torch.float16, 1024) == 128
    assert block("matmul", torch.float16, 0) == 16  # an empty dimension has no octave
    tile = choose_tile("matmul", torch.float16, DEFAULT, M=1024, N=16, K=1024)
    assert (tile["BLOCK_N"], tile["num_warps"]) == (16, 8)  # shrunk as a default is


def test_no_table_no_tiles(tmp_path):
    assert read_tuned(tmp_path / "missing.json") == {}


ENTRY = dict(op="matmul", dtype="float16", sizes=dict(M=64, N=64, K=64), tile=TILE)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not JSON: Expecting value"),
        ('{"tiles": [{"op": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON: 'utf-8' codec"),
        ([], 'must hold {"tiles": [...]}'),
        ({"tiles": {}}, 'must hold {"tiles": [...]}'),
        ({"tiles": [ENTRY, 1]}, "entry 1 of tiles must have an op"),
        ({"tiles": [ENTRY | dict(op=None)]}, "entry 0 of tiles must have an op"),
        ({"tiles": [ENTRY | dict(dtype="half")]}, "must have dtype .*, got 'half'"),
        ({"tiles": [ENTRY | dict(sizes=[64])]}, r"must have sizes, each an int, got \[64\]"),
        ({"tiles": [ENTRY | dict(sizes=dict(M="64"))]}, "must have sizes, each an int"),
        ({"tiles": [ENTRY | dict(tile=None)]}, "must have a tile, of ints, got None"),
        ({"tiles": [ENTRY | dict(tile=TILE | dict(BLOCK_K=[1]))]}, "must have a tile, of ints"),
        ({"tiles": [ENTRY | dict(sizes=dict(M=1, C=1))]}, "must have BLOCK_C in its tile"),
    ],
)
def test_a_damaged_table_is_one_clear_line(content, message, tmp_path):
    path = tmp_path / "some-gpu.json"
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    message = message.replace("{", r"\{").replace("[...]", r"\[...\]")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}") as caught:
        read_tuned(path)
    assert "\n" not in str(caught.value)


def test_looking_a_tile_up_again(gpu, monkeypatch):
    """It is kept by op, dtype, GPU and sizes, until the tables are forgotten or exchanged."""

    def tile(M=64, dtype=torch.float16, op="matmul"):
        return choose_tile(op, dtype, DEFAULT, M=M, N=64, K=64)

    def table(**tile):
        return {("matmul", "float16"): [ENTRY | dict(tile=TILE | tile)]}

    gpu |= table(num_warps=1)
    first = tile()
    first["num_warps"] = 99  # who changes a tile changes no other
    assert tile()["num_warps"] == 1 and TILE["num_warps"] == 4
    assert tile(dtype=torch.bfloat16)["num_warps"] == tile(op="conv2d")["num_warps"] == 4
    assert tile(M=16)["BLOCK_M"] == 16 and tile()["BLOCK_M"] == 64
    monkeypatch.setattr(_tiles, "_tuned", lambda gpu: table(num_warps=len(gpu)))
    assert tile()["num_warps"] == 8
    monkeypatch.setattr(_launch, "_name", lambda index: "A GPU of 16 char")
    assert tile()["num_warps"] == 16
    with use_tile("matmul", TILE):
        assert tile() is TILE
    assert tile()["num_warps"] == 16


def test_a_call_takes_the_tuned_tiles_of_the_gpu_that_its_operands_are_on(monkeypatch):
    """Not those of the current device: a process may call on cuda:1 and never make it current."""

    class On(torch.Tensor):
        """A tensor that says it is on the GPU of this index."""

        index = 0

        def get_device(self):
            return self.index

    tables = {
        name: {("matmul", "float16"): [ENTRY | dict(tile=TILE | dict(num_warps=warps))]}
        for name, warps in (("GPU zero", 1), ("GPU one", 2))
    }
    names = list(tables)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device])
    monkeypatch.setattr(_tiles, "_tuned", tables.get)
    _launch._name.cache_clear()
    for index, warps in ((1, 2), (0, 1), (1, 2)):
        x = torch.empty(0, dtype=torch.float16).as_subclass(On)
        x.index = index
        tile = _tiles.choose_tile("matmul", x, DEFAULT, M=64, N=64, K=64)
        assert tile["num_warps"] == warps
    _launch._name.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_on_the_second_gpu_takes_its_tuned_tiles(monkeypatch):
    asked = []
    monkeypatch.setattr(_launch, "_name", lambda index: asked.append(index) or "none")
    x = torch.ones(64, 64, device="cuda:1", dtype=torch.float16)
    assert torch.cuda.current_device() == 0
    assert torch.equal(kernels.matmul(x, x), x @ x) and set(asked) == {1}


def test_forget_tuned(monkeypatch, tmp_path):
    path = tmp_path / "some-gpu.json"
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "_name", lambda index: "Some GPU")
    monkeypatch.setattr(_tiles, "tuned_path", lambda name: tuned_path(name, tmp_path))
    for warps in (1, 2):
        _tiles.forget_tuned()
        path.write_text(json.dumps({"tiles": [ENTRY | dict(tile=TILE | dict(num_warps=warps))]}))
        for _ in range(2):
            tile = choose_tile("matmul", torch.float16, DEFAULT, M=64, N=64, K=64)
            assert tile["num_warps"] == warps
        path.write_text("damaged")  # it is not read on every call
        assert choose_tile("matmul", torch.float16, DEFAULT, M=64, N=64, K=64) == tile
    _tiles.forget_tuned()
    for _ in range(2):
        with pytest.raises(ValueError, match="some-gpu.json is not JSON"):
            choose_tile("matmul", torch.float16, DEFAULT, M=64, N=64, K=64)
    _tiles.forget_tuned()


def test_a_table_of_other_dimensions_is_passed_over(gpu):
    gpu["matmul", "float16"] = [ENTRY | dict(sizes=dict(M=64, C=64), tile=TILE | dict(BLOCK_C=16))]
    assert choose_tile("matmul", torch.float16, DEFAULT, M=999, N=999, K=999) == TILE


@pytest.mark.parametrize(
    "name, file",
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb.json"),
        ("AMD Instinct MI300X / MI325X", "amd-instinct-mi300x---mi325x.json"),
        ("../../etc/GPU:0\\x", "etc-gpu-0-x.json"),
    ],
)
def test_tuned_path(name, file, tmp_path):
    assert tuned_path(name, tmp_path) == tmp_path / file
    assert tuned_path(name).parent == ROOT / "kernels" / "tuned"
    with pytest.raises(ValueError, match="gpu must be the name of a device, got ' /'"):
        tuned_path(" /")


def test_shipped_tables_can_be_read():
    for path in (ROOT / "kernels" / "tuned").glob("*.json"):
        for (op, dtype), entries in read_tuned(path).items():
            assert dtype in ("float32", "float16", "bfloat16"), (path, op)
            for entry in entries:
                assert all(f"BLOCK_{k}" in entry["tile"] for k in entry["sizes"]), (path, op)


def test_forced_tile_is_taken_as_it_is():
    """Not shrunk, not enlarged; the innermost counts; afterwards all is as before."""
    sizes = dict(M=5, N=5, K=5)
    before = choose_tile("op", torch.float32, DEFAULT, **sizes)
    with use_tile("op", TILE):
        with use_tile("op", {"BLOCK_M": 32}), use_tile("another", {}):
            assert choose_tile("op", torch.float32, DEFAULT, **sizes) == {"BLOCK_M": 32}
        assert choose_tile("op", torch.float32, DEFAULT, **sizes) == TILE
        assert choose_tile("another", torch.float32, DEFAULT, **sizes) == before
    assert choose_tile("op", torch.float32, DEFAULT, **sizes) == before
    with pytest.raises(KeyError), use_tile("op", TILE):
        raise KeyError
    assert choose_tile("op", torch.float32, DEFAULT, **sizes) == before


@interpreter_only
@pytest.mark.parametrize(
    "sizes, expected",
    [
        (dict(M=1024, N=1024, K=1024), dict(M=1024, N=1024, K=256)),
        (dict(M=10, N=10, K=10), dict(M=16, N=16, K=16)),
        (dict(M=10**6, N=10, K=10), dict(M=2**14, N=16, K=16)),  # a load of [M, K] is 2^18
        (dict(M=10**6, N=1024, K=16), dict(M=1024, N=1024, K=16)),  # the product is 2^20
        (dict(M=10**6, N=64), dict(M=2**12, N=64)),  # no dot: [M, N] itself is loaded
        (dict(M=10, N=10**6), dict(M=16, N=1024)),
        (dict(N=10**9), dict(N=2**18)),
    ],
    ids=str,
)
def test_interpreter_tiles(sizes, expected):
    default = {4: {f"BLOCK_{k}": 32 for k in sizes} | dict(num_warps=4)}
    tile = choose_tile("op", torch.float32, default, **sizes)
    assert {k: tile[f"BLOCK_{k}"] for k in sizes} == expected
    assert tile["num_warps"] == 4


@interpreter_only
@hypothesis.given(M=st.integers(0, 2**31), N=st.integers(0, 2**31), K=st.integers(0, 2**31))
def test_interpreter_tiles_stay_within_the_limits(M, N, K):
    tile = choose_tile("op", torch.float32, DEFAULT, M=M, N=N, K=K)
    m, n, k = (tile[f"BLOCK_{d}"] for d in "MNK")
    assert all(b >= 16 and b & (b - 1) == 0 for b in (m, n, k))
    assert m * n <= 2**20, "Triton's limit for one tensor"
    assert max(m * k, k * n) <= 2**18, "what the cache holds"


@pytest.mark.parametrize(
    "per_sm, work, programs", [(1, 500, 132), (2, 500, 264), (2, 9, 9), (0, 500, 500)]
)
def test_persistent(per_sm, work, programs):
    assert persistent(dict(PROGRAMS_PER_SM=per_sm), work, sms=132) == programs


def test_splits(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRET", False)
    assert part_count(programs=1, steps=10_000) == 512
    assert part_count(programs=100, steps=10_000) == 5
    assert part_count(programs=1000, steps=10_000) == 1
    assert part_count(programs=1, steps=80) == 10  # at least 8 steps each
    assert part_count(programs=1, steps=0) == part_count(programs=0, steps=7) == 1
    monkeypatch.setattr(_launch, "INTERPRET", True)
    assert part_count(programs=1, steps=10_000) == 1


# --- launch -------------------------------------------------------------------------------------


@triton.jit
def scale_kernel(x_ptr, y_ptr, N, factor, stride, BLOCK: tl.constexpr):
    """One program computes BLOCK elements of y = factor * x, every `stride`-th element."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs * stride, (x * factor).to(y_ptr.dtype.element_ty), mask=offs < N)


@triton.jit
def fill_kernel(table_ptr, sizes_ptr, BLOCK: tl.constexpr):
    """One program fills one float32 tensor of the table with its number, from 1."""
    i = tl.program_id(0)
    x_ptr = tl.load(table_ptr + i).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    number = tl.full((BLOCK,), 1.0, tl.float32) * (i + 1)
    tl.store(x_ptr + offs, number, mask=offs < tl.load(sizes_ptr + i))


@pytest.mark.parametrize("grid", [(0,), (0, 5), (3, 0, 1)])
def test_an_empty_grid_launches_nothing(grid):
    launch(None, grid, torch.ones(1))  # None cannot be launched


@pytest.mark.core
def test_list_of_tensors_becomes_a_table_of_addresses():
    sizes = [3, 1, 20]
    tensors = [torch.zeros(n, device=DEVICE) for n in sizes]
    launch(fill_kernel, (3,), tensors, torch.tensor(sizes, device=DEVICE), BLOCK=32)
    for i, x in enumerate(tensors):
        assert torch.equal(x, torch.full_like(x, i + 1))


@interpreter_only
@pytest.mark.core
def test_list_of_bfloat16_tensors_is_computed_in_float32():
    tensors = [torch.zeros(n, dtype=torch.bfloat16) for n in (3, 20)]
    launch(fill_kernel, (2,), tensors, torch.tensor([3, 20]), BLOCK=32)
    assert [x.tolist() for x in tensors] == [[1.0] * 3, [2.0] * 20]


@pytest.mark.core
def test_bfloat16_results_are_rounded_to_nearest_even():
    """All 2^16 numbers, by a factor that makes ties and everything between them."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).to(DEVICE)
    for factor in (1.0, 1 + 2**-8, 1 + 3 * 2**-8, 0.3):
        y = torch.empty_like(x)
        launch(scale_kernel, (16,), x, y, 2**16, factor, 1, BLOCK=2**12)
        want = (x.float() * factor).to(torch.bfloat16)
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.core
def test_what_a_kernel_does_not_write_keeps_its_bits():
    """NaN of any payload included, though it does not survive a conversion to float32 and back."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).to(DEVICE)
    x, y = bits.clone().view(torch.bfloat16), bits.clone().view(torch.bfloat16)
    launch(scale_kernel, (1,), x[100:], y[100:], 10, 2.0, 3, BLOCK=16)
    written = torch.zeros(2**16, dtype=torch.bool, device=DEVICE)
    written[100:130:3] = True
    assert torch.equal(x.view(torch.int16), bits)
    assert torch.equal(y.view(torch.int16)[~written], bits[~written])
    assert torch.equal(y[written], 2 * x[written])


def test_views_of_one_buffer_are_views_of_one_twin():
    buffer = randn(40, dtype=torch.bfloat16)
    before = buffer.clone()
    launch(scale_kernel, (1,), buffer[:20], buffer[20:], 20, 2.0, 1, BLOCK=32)
    assert torch.equal(buffer[:20], before[:20])
    assert torch.equal(buffer[20:], 2 * before[:20])
    launch(scale_kernel, (1,), buffer, buffer, 40, 0.5, 1, BLOCK=64)  # in place
    assert torch.equal(buffer[:20], before[:20] / 2)


# --- _rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 5, 6), (3, 4, 5, 6), (3, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "sliced"])
def test_as_rows_is_a_view(shape, layout):
    if layout == "channels_last" and len(shape) < 3:
        layout = "contiguous"
    x = randn(*shape, layout=layout)
    for dim in range(-len(shape), len(shape)):
        *sizes, stride_0, stride_1, stride_2, stride_l = as_rows(dim, x)
        rows = x.as_strided(sizes, (stride_0, stride_1, stride_2, stride_l), x.storage_offset())
        want = x.movedim(dim, -1).reshape(-1, shape[dim])
        assert torch.equal(rows.reshape(-1, shape[dim]), want)


def test_as_rows_joins_what_lies_together_in_all_tensors():
    nchw = torch.empty(2, 3, 4, 5)
    nhwc = nchw.to(memory_format=torch.channels_last)
    assert as_rows(1, nhwc) == (40, 1, 1, 3, 3, 0, 0, 1)
    assert as_rows(1, nchw) == (2, 20, 1, 3, 60, 1, 0, 20)
    assert as_rows(1, nhwc, nchw) == (2, 20, 1, 3, 60, 3, 0, 1, 60, 1, 0, 20)
    assert as_rows(3, nchw) == (24, 1, 1, 5, 5, 0, 0, 1)
    assert as_rows(1, nchw[..., ::2]) == (2, 4, 3, 3, 60, 5, 2, 20)[:4] + (60, 5, 2, 20)
    one = torch.empty(()).expand(2, 3, 4, 5)  # stride 0 goes with stride 0
    assert as_rows(1, one) == (24 // 3 * 5, 1, 1, 3, 0, 0, 0, 0)
    assert as_rows(0, torch.empty(0, 3)) == (3, 1, 1, 0, 1, 0, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 37])
@pytest.mark.parametrize("size", [1, 15, 16, 129, 5000])
def test_sum_partials(size, parts, dtype):
    partials = randn(parts, size)
    with poison() as p:
        out = p(torch.empty(size, dtype=dtype, device=DEVICE), written=True)
        sum_partials(p(partials), out)
    assert_close(out, double(partials).sum(0), dtype=dtype, terms=parts)

"""Compiling for GPUs that are not here: the right kernels, and workers that may die."""

import contextlib
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import torch

from tilelab.kernels import _launch
from tilelab.perf.commands import arguments, validate
from tilelab.perf.compiler import aot, facts
from tilelab.perf.work import operators, shapes, workloads
from tilelab.perf.work.gpus import TARGETS
from tilelab.perf.work.operators import OPERATORS
from tilelab.perf.work.workloads import Workload

pytestmark = pytest.mark.core  # with the oldest triton, too

LAYER = dict(N=32, C=128, H=28, W=28, K=256, R=3, S=3, stride=1, padding=1, dilation=1, groups=1)
CONV = Workload("conv2d", "fwd", "bfloat16", "ieee", LAYER, "layer")
MATMUL = Workload("matmul", "fwd", "bfloat16", "ieee", dict(M=4096, N=2048, K=1024), "m")
TILE = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)


@pytest.fixture(scope="module")
def compilers():
    with aot.Compilers(1) as pool:
        yield pool


def test_a_trace_is_what_would_be_launched():
    trace = aot.trace(MATMUL, TILE)
    assert trace.tile_op is operators.MATMUL and trace.choice.sizes == dict(M=4096, N=2048, K=1024)
    assert trace.main.grid == (32 * 16,)
    assert {k: trace.main.meta[k] for k in TILE} == TILE
    assert trace.about["moved"] == 2 * (4096 * 1024 + 1024 * 2048 + 4096 * 2048)


def test_a_trace_counts_intermediate_results():
    """Explicit im2col writes the matrix and reads it: 2 N P Q C R S e bytes more."""
    base, explicit = (
        aot.trace(CONV, None),
        aot.trace(CONV._replace(op="conv2d_im2col"), None),
    )
    matrix = 32 * 28 * 28 * 128 * 9 * 2
    assert explicit.about["moved"] - base.about["moved"] == 2 * matrix
    assert explicit.main.kernel.__name__ == "matmul_kernel" and len(explicit.launches) == 2


def test_a_trace_of_few_channels_finds_the_other_kernel():
    stem = CONV._replace(shape=LAYER | dict(C=3))
    assert aot.trace(stem, None).tile_op is operators.CONV_FLAT


class conv2d_tma_kernel:
    arg_names = ("x", "N", "P", "Q", "K", "SPAN", "BLOCK_N")


BOX = dict(
    TILE_N=2, TILE_P=8, TILE_Q=16, BLOCK_N=128, BLOCK_K=64, R=3, S=3, SPLIT_K=1, num_warps=8,
    num_stages=3,
)  # fmt: skip


def boxes(grid, sizes, **meta):
    launch = _launch.Launch(conv2d_tma_kernel, grid, (None, *sizes), BOX | meta)
    return aot.work_of_boxes(operators.CONV, launch)


def test_the_work_of_boxes_is_all_that_the_launch_computes():
    """32 images of 14 x 14: 16 x 2 x 1 boxes of 256 pixels; 200 channels are two blocks of 128."""
    step = 2 * 256 * 128 * 64
    one = boxes((64,), (32, 14, 14, 200, 100))
    assert one == dict(units=64, computed_flops=64 * 9 * 2 * step)
    # Parts of a sum are pieces of work, but no more of it.
    parts = boxes((132,), (32, 14, 14, 200, 100), SPLIT_K=4)
    assert parts == dict(units=256, computed_flops=64 * 9 * 2 * step)
    # A stem of 7x7 taps, packed to 7 taps of 32 channels.
    stem = boxes((64,), (32, 14, 14, 200, 32), R=7, S=1, BLOCK_K=32)
    assert stem["computed_flops"] == 64 * 7 * step // 2
    assert aot.work_of_boxes(operators.CONV, aot.trace(CONV, None).main) == {}


def work(mode, tile, **shape):
    w = CONV._replace(mode=mode, shape=LAYER | shape)
    trace = aot.trace(w, tile, "sm_90")
    return aot.work_of_boxes(trace.tile_op, trace.main), w.flops


def test_the_work_of_an_input_gradient():
    """Whole boxes of 128 channels; at stride 2 each tap once, of one of four classes of pixels."""
    tile = dict(
        kernel="tma", BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, SPLIT_K=1, PROGRAMS_PER_SM=1,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    found, flops = work("dgrad", tile, K=256)
    assert found == dict(units=98, computed_flops=flops)
    assert work("dgrad", tile, K=256, C=72) == (found, flops * 72 // 128)  # of as many
    found, flops = work("dgrad", tile, H=64, W=64, stride=2)  # 1,024 pixels a class
    assert found == dict(units=4 * 128, computed_flops=flops)
    assert work("dgrad", tile | dict(SPLIT_K=2))[0]["units"] == 2 * 98


def test_the_work_of_a_weight_gradient():
    """Taps in the padding are left out: 82 of 84 rows of three taps, of 28 pixels each."""
    tile = dict(
        kernel="tma", BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, SPLIT_K=4, SUBTILES=4,
        PROGRAMS_PER_SM=2, num_warps=8, num_stages=6,
    )  # fmt: skip
    found, flops = work("wgrad", tile)
    assert found["units"] == 4 * 9 * 2 and found["computed_flops"] * 84**2 == flops * 82**2
    assert (
        work("wgrad", tile | dict(BLOCK_K=64))[0]["computed_flops"] == 2 * found["computed_flops"]
    )
    found, flops = work("wgrad", tile, R=1, S=1, padding=0)
    assert found == dict(units=4 * 2, computed_flops=flops)
    # Windows of 3 x 48, of which a tile has two rows of 64; and four rows are computed of three.
    found, flops = work("wgrad", tile, C=16, K=128, padding=0)
    assert found == dict(units=4 * 2, computed_flops=flops * 4 * 64 // (3 * 48))
    # Pixels are columns: of eight blocks of 64x64 six are taps, or of four blocks three.
    wide = tile | dict(BLOCK_N=256, PROGRAMS_PER_SM=1)
    found, flops = work("wgrad", wide, C=64, K=64)
    assert found["units"] == 4 * 3 and found["computed_flops"] * 6 * 84 == flops * 8 * 82
    found, flops = work("wgrad", wide, C=64, K=128)
    assert found["units"] == 4 * 3 and found["computed_flops"] * 3 * 84 == flops * 4 * 82


def test_the_launch_that_has_the_tile_is_not_always_the_first():
    """A stem is packed before: each choice is followed by its launch, also within another's."""
    stem = CONV._replace(shape=LAYER | dict(C=3))
    trace = aot.trace(stem, None, "sm_90")
    names = [launch.kernel.__name__ for launch in trace.launches]
    assert names == ["conv2d_pack_kernel", "conv2d_pack_filter_kernel", "conv2d_tma_kernel"]
    assert trace.main is trace.launches[2] and trace.tile_op is operators.CONV_FLAT
    choice = trace.choice
    assert aot._launch_of([choice]) is None
    assert aot._launch_of([choice, *trace.launches]) is trace.launches[0]


def test_a_1x1_convolution_is_swept_as_the_matmul_that_it_is():
    w = CONV._replace(shape=LAYER | dict(R=1, S=1, padding=0))
    described = aot.describe(w, "sm_90")
    assert described["tile_op"] == "matmul"
    assert described["sizes"] == dict(M=32 * 28 * 28, N=256, K=128)
    tiles = arguments.tiles(described, w, [])
    assert {t.get("kernel") for t in tiles} == {None, "tma", "tma_ws"}
    trace = aot.trace(w, tiles[-1], "sm_90")
    assert trace.choice.tile == tiles[-1] and trace.main.meta["BLOCK_M"] == tiles[-1]["BLOCK_M"]


def test_a_lesson_may_be_three_files():
    names = ("conv2d", "conv2d_tma")
    conv, conv_fast = (importlib.import_module(f"tilelab.kernels.{m}") for m in names)
    for op in ("conv2d", "conv2d_flat", "conv2d_grouped"):
        found = aot.lesson_tiles(op, "tilelab.kernels.conv2d_tma", 2)
        assert found == (conv_fast.FAST_TILES[2], conv.TILES, conv.RUNGS)
    for op in ("conv2d_input_grad", "conv2d_weight_grad"):
        slow, fast = (importlib.import_module(f"tilelab.kernels.{op}{end}") for end in ("", "_tma"))
        assert aot.lesson_tiles(op, fast.__name__, 2) == (fast.FAST_TILES[2], slow.TILES, [])
    found = aot.lesson_tiles("conv2d", "tilelab.kernels.conv2d", 4)
    assert found == (conv_fast.FAST_TILES[4], conv.TILES, conv.RUNGS)
    assert aot.lesson_tiles("conv2d", "tilelab.kernels.conv2d_tma", 1)[0] == []
    rungs = {tile.get("kernel") for tile in aot.describe(CONV)["lesson"]}
    assert rungs == {None, "direct", "flat"}  # where there is no TMA
    rungs = {tile.get("kernel") for tile in aot.describe(CONV, "sm_90")["lesson"]}
    assert rungs == {None, "direct", "flat", "tma"}


def test_nothing_runs_while_recording():
    with _launch.record() as events:
        pass
    assert events == [] and _launch._recorded is None


def test_every_operator_has_a_main_kernel_or_is_a_whole_step():
    for op, o in OPERATORS.items():
        shape = shapes.shapes(op, "tiny")[0]
        for mode, about in o.modes.items():
            dtype = "float16" if "fp16" in o.dtypes else workloads.DTYPES[o.dtypes[0]][0]
            trace = aot.trace(Workload(op, mode, dtype, "ieee", shape.sizes, ""), None)
            assert trace.tile_op in (about.tile_ops or (None,)), (op, mode)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compile(compilers, target):
    row = compilers.submit("compile", list(MATMUL), TILE, target).result()
    assert "failed" not in row
    assert row["kernel"] == "matmul_kernel" and row["programs"] == 32 * 16
    assert row["tensor_core"] and row["spills"] == 0 and row["load_bytes"] == 16
    warp = 64 if target.startswith("gfx") else 32
    assert row["threads"] == 8 * warp
    assert 0 < row["registers"] <= 512 and row["loop_instructions"] > 20
    core = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}
    assert row["tensor_core"].startswith(core[target])


@pytest.mark.slow
def test_describe_gives_the_gpus_default_and_the_lessons_tiles(compilers):
    described = compilers.submit("describe", list(CONV), "").result()
    assert described["tile_op"] == "conv2d"
    assert described["sizes"] == dict(M=32 * 28 * 28, N=256, K=128)
    assert described["tile"]["BLOCK_M"] <= 128  # not the interpreter's thousands
    assert described["tile"] in described["lesson"]


@pytest.mark.slow
def test_the_annotated_loop_names_the_lines_of_the_kernel(compilers):
    loop = compilers.submit("annotate", list(MATMUL), TILE, "sm_90").result()
    lines = open(aot.kernels.__path__[0] + "/matmul.py").read().splitlines()
    at = {lines[number - 1].strip() for file, number, _ in loop if file.endswith("matmul.py")}
    assert any(text.startswith("acc = tl.dot(") for text in at)
    assert any("HGMMA" in instruction for _, _, instruction in loop)


@pytest.mark.slow
def test_what_does_not_compile_is_a_row(compilers):
    tile = TILE | dict(BLOCK_M=48)
    row = compilers.submit("compile", list(MATMUL), tile, "sm_90").result()
    assert row["failed"].startswith("does not compile: ") and "\n" not in row["failed"]


@pytest.mark.slow
def test_a_worker_that_dies_takes_one_job_along(compilers):
    compilers.submit("describe", list(MATMUL), "").result()
    compilers._processes[-1].kill()
    compilers._processes[-1].wait()
    again = compilers.submit("describe", list(MATMUL), "").result()
    assert again["tile_op"] == "matmul"  # a new worker, which sees no GPU that is measured
    seen = pathlib.Path(f"/proc/{compilers._processes[-1].pid}/environ").read_text().split("\0")
    assert {"CUDA_VISIBLE_DEVICES=", "HIP_VISIBLE_DEVICES="} <= set(seen)
    stuck = compilers.submit("wrong job", list(MATMUL), "").result()
    assert "KeyError" in stuck["failed"]


PARENT = """
import sys
from tests.perf.test_aot import MATMUL, TILE
from tilelab.perf.compiler import aot
pool = aot.Compilers(1)
pool.submit("describe", MATMUL, "").result()
pool.submit("compile", MATMUL, TILE, "sm_90")
print(pool._processes[0].pid, flush=True)
sys.stdin.read()
"""


PTXAS = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
*) sleep 600; true ;;
esac
"""


def alive(session):
    """The processes of a session."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            found += [path.parent.name] if fields[0] != "Z" and int(fields[3]) == session else []
    return found


@pytest.mark.slow
def test_no_worker_outlives_a_parent_that_is_killed(tmp_path):
    """Killed with SIGKILL, while the worker waits for an assembler that takes ten minutes."""
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(PTXAS)
    ptxas.chmod(0o755)
    names = "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=pathlib.Path(__file__).parents[2], text=True,
        env=os.environ | {name: str(ptxas) for name in names} | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    with parent:
        worker = int(parent.stdout.readline())
        while len(alive(worker)) < 3:  # the worker, the script, and what this waits for
            assert time.monotonic() < deadline, "it does not wait for the assembler"
            time.sleep(0.02)
        parent.kill()
    deadline = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < deadline, "it compiles for nobody"
        time.sleep(0.02)


def test_bytes_of_views_that_begin_at_the_same_address():
    x = torch.empty(8, 4)
    assert aot._bytes((x, x[:2], [x.t()], 3)) == aot._bytes((x[:2], x)) == 8 * 4 * 4


def test_a_compiler_is_not_an_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "0":
        pytest.skip("this process compiles")
    with pytest.raises(RuntimeError, match="this process interprets"):
        aot.compile_for("sm_90")


def test_source_hash_is_of_what_a_kernel_is_made_of(monkeypatch, tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(pathlib.Path(aot.kernels.__file__).parent, folder)
    monkeypatch.setattr(aot.kernels, "__file__", str(folder / "__init__.py"))
    aot.source_hash.cache_clear()
    users, others = ("bias_relu", "matmul", "conv2d", "train_step"), ("softmax", "sgd")
    before = {op: aot.source_hash(op) for op in (*users, *others)}
    (folder / "bias_relu.py").write_text((folder / "bias_relu.py").read_text() + "\n# changed\n")
    aot.source_hash.cache_clear()
    assert [op for op in before if aot.source_hash(op) != before[op]] == list(users)
    aot.source_hash.cache_clear()


def test_a_product_in_the_layout_that_no_mode_has(compilers):
    """It compiles, and to what the facts of the public measurements say."""
    header, committed = facts.read(validate.FACTS)
    key = next(k for k in sorted(committed) if k.layout == "tt" and k.tile[:3] == (16, 32, 16))
    job = facts.typical(key), facts.tile_of(key), key.target, key.layout
    answer = compilers.submit("compile", *job).result()
    assert answer["kernel"] == "matmul_kernel" and answer["tensor_core"]
    if header == facts.today():
        fact = committed[key]
        assert {name: answer[name] for name in fact} == fact

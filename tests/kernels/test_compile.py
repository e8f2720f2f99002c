"""Every kernel compiles for GPUs that are not here: it fits, spills nothing, uses tensor cores.

The facts about most launches are committed, and every bar of tests/tools/compile_bars.py is held to
them. What has no fact is compiled here, and so is a random thirtieth of the rest, which has to be
what its fact says. COMPILE_SEED in the environment chooses another part, or the same one again.
With CI in the environment a launch that has no fact is a failure.
"""

import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import types
import warnings

import pytest
import triton

from tests.tools import compile_bars, compile_cases, compile_facts, memory_counts
from tests.tools.compile_facts import COMMAND, difference, of_part, read, rows_of

pytestmark = pytest.mark.interpreter("it compiles in processes of its own")

CORE = pytest.param("sm_90 core", marks=pytest.mark.core)
PARTS = [CORE, "sm_90", "sm_80", "sm_100", "gfx942"]
SHARDS = {
    "sm_90 core": 4,
    "sm_90": 3,
    "sm_80": 2,
    "sm_100": 3,
    "gfx942": 2,
}  # by how long they take
SEED = os.environ.get("COMPILE_SEED")


@pytest.fixture(scope="session")
def worker():
    with compile_facts.Worker() as worker:
        yield worker


def target_of(part):
    return part.split()[0]


def launches_of(worker, part):
    return of_part(worker.launches(target_of(part)), part)


def held(rows):
    """Every bar that a launch misses, in words."""
    return "\n".join(
        f"{what}: {compile_bars.describe(row)}"
        for row in rows
        for what in compile_bars.problems(row)
    )


# --- the facts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_every_launch_is_held_to_its_bars(part, worker):
    rows = rows_of(launches_of(worker, part), read(target_of(part)))
    if not rows:
        pytest.skip(f"triton {triton.__version__} has no facts: only a thirtieth is compiled")
    assert not held(rows), held(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, shard",
    [
        pytest.param(part, shard, marks=[pytest.mark.core] * part.endswith("core"))
        for part, shards in SHARDS.items()
        for shard in range(shards)
    ],
)
def test_what_has_no_fact_and_a_thirtieth_of_the_rest_compile(part, shard, worker):
    target, launches = target_of(part), launches_of(worker, part)
    facts, seed = read(target), SEED or str(random.randrange(10**6))
    print(f"COMPILE_SEED={seed}")
    keys = sorted({row["key"] for row in launches})[shard :: SHARDS[part]]
    missing = [key for key in keys if key not in facts]
    if not any(row["key"] in facts for row in launches) and not os.environ.get("CI"):
        missing = []  # a version of triton for which nobody has written facts
    assert not (missing and os.environ.get("CI")), (
        f"{len(missing)} launches have no fact: {COMMAND}"
    )
    rest = sorted(set(keys) - set(missing))
    compiled = {
        key: worker.fact(target, key)
        for key in missing + random.Random(seed).sample(rest, -(-len(rest) // 30))
    }
    if missing:
        warnings.warn(f"{len(missing)} launches have no fact: {COMMAND}", stacklevel=1)
    rows = rows_of([row for row in launches if row["key"] in compiled], compiled)
    assert not held(rows), held(rows)
    differ = [
        f"{key}: {difference(facts[key], fact)}"
        for key, fact in compiled.items()
        if key in facts and facts[key] != fact
    ]
    assert not differ, "\n".join([f"COMPILE_SEED={seed}, {COMMAND}", *differ])


@pytest.mark.parametrize("target", compile_facts.TARGETS)
def test_every_fact_is_of_a_launch(target, worker):
    keys = {row["key"] for row in worker.launches(target)}
    orphans = read(target).keys() - keys
    assert not orphans, f"{len(orphans)} facts that no case asks for: {COMMAND}"


@pytest.mark.parametrize("target", memory_counts.TARGETS)
def test_every_default_launch_has_counts(target, worker):
    """Those of docs/memory.md, which the machine makes by executing one program of each."""
    file = memory_counts.read()
    if file["triton"] != triton.__version__:
        pytest.skip(f"the counts are those of triton {file['triton']}")
    rows = [row for row in file["launches"] if row["target"] == target]
    wrong = [memory_counts.describe(row) for row in rows if "failed" in row or "findings" in row]
    assert not wrong, "\n".join(wrong)
    counted = {row["key"] for row in rows}
    wanted = {
        row["key"]
        for row in worker.launches(target)
        if row["group"] == "default" and row["case"] in compile_cases.CALLS
    }
    assert counted == wanted, f"{len(counted ^ wanted)} differ: python -m tests.tools.memory_counts"


# --- the cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", compile_facts.TARGETS)
def test_every_kernel_has_a_case(target, worker):
    defined = {
        name
        for module in compile_cases.modules()
        for name, x in vars(module).items()
        if name.endswith("_kernel") and hasattr(x, "fn")
    }
    launched = {row["kernel"] for row in worker.launches(target) if row["group"] == "default"}
    lacking = set() if target in ("sm_90", "sm_100") else compile_cases.TMA_ONLY
    assert defined - launched == lacking


def test_the_cases_have_every_tile_in_every_way(worker):
    """As many launches as tiles, times the ways in which each can be compiled."""
    launches = worker.launches("sm_90")
    count = collections.Counter((row["group"], row["kernel"]) for row in launches)
    lesson, small = compile_cases.lesson, compile_cases.is_small

    half, full = (lesson("matmul_tma").FAST_TILES[item] for item in (2, 4))
    split = sum(map(small, half))
    assert split and count["matmul", "matmul_kernel"] == 3 * len(lesson("matmul").TILES)
    assert count["matmul", "matmul_tma_kernel"] == 5 * len(half) + split + len(full)

    half, full = (lesson("conv2d_tma").FAST_TILES[item] for item in (2, 4))
    narrow, split = sum(tile["BLOCK_N"] == 64 for tile in half), sum(map(small, half))
    assert narrow and split
    fast = 7 * len(half) + 2 * narrow + split + 3 * len(full)
    assert count["conv2d", "conv2d_tma_kernel"] == fast
    assert count["conv2d", "conv2d_kernel"] >= len(lesson("conv2d").TILES)
    others = ("direct", "flat", "pack", "pack_filter")
    assert all(count["conv2d", f"conv2d_{name}_kernel"] for name in others)

    name = "conv2d_input_grad_tma_kernel"
    assert count["input grad", name] == 6 * len(half) + split + 4 * len(full) - 2

    tiles = lesson("conv2d_weight_grad_tma").FAST_TILES[2]
    narrow, wide = (sum(t[k] == n for t in tiles) for k, n in (("BLOCK_M", 64), ("BLOCK_N", 256)))
    rows = [row for row in launches if row["group"] == "weight grad"]
    assert len(rows) == 1 + 4 * len(tiles) + 2 * narrow + 3 * wide
    assert sum(row["constants"]["DY_PIXELS"] == 2 for row in rows) == 4
    assert sum(row["constants"]["X_STEP"] > 0 for row in rows) == 3 * wide

    tiles = lesson("scaled_matmul").FAST_TILES[1]
    assert count["scaled", "scaled_matmul_tma_kernel"] == 6 * len(tiles)
    memory = {row["case"] for row in launches if row["group"] == "memory"}
    assert memory == set(compile_cases.MEMORY_CALLS)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_the_cases_elsewhere(target, worker):
    """The portable kernels' tiles everywhere, and those for TMA on Blackwell."""
    launches, lesson = worker.launches(target), compile_cases.lesson
    count = collections.Counter((row["group"], row["kernel"]) for row in launches)
    fast = [(group, kernel) for group, kernel in count if group != "default" and "_tma_" in kernel]
    tiles = lesson("matmul").TILES
    if target == "gfx942":
        tiles = [tile for tile in tiles if compile_cases.fits(tile, 64 * 1024)]
    assert count["matmul", "matmul_kernel"] == 3 * len(tiles) > 20
    conv = lesson("conv2d")
    portable = [count["conv2d", f"conv2d{name}_kernel"] for name in ("", "_direct", "_flat")]
    assert sum(portable) >= len(conv.TILES) + len(conv.RUNGS)
    if target != "sm_100":
        assert not fast
        return
    assert count["matmul", "matmul_tma_kernel"] > 20
    assert count["conv2d", "conv2d_tma_kernel"] > 40
    assert count["input grad", "conv2d_input_grad_tma_kernel"] > 40
    deep = [t for t in lesson("conv2d_weight_grad_tma").FAST_TILES[2] if t["BLOCK_K"] == 64]
    assert count["weight grad", "conv2d_weight_grad_tma_kernel"] > 4 * len(deep)


# --- tests of the tests ---------------------------------------------------------------------------

# What makes a launch miss each bar.
DOCTORED = {
    "spills": dict(spills=64),
    "too much shared memory": dict(shared=300 * 1024),
    "no tensor cores": dict(tensor_cores=[]),
    "wgmma is narrower than the tile": dict(tensor_core="HGMMA.64x32x16.F32"),
    "an operand is in registers": dict(operands="registers"),
    "each wgmma waits for the last": dict(serialised=True),
    "no loads a step ahead": dict(ahead=False),
    "a narrow tile": dict(BLOCK_N=64, TILE_N=1, TILE_P=8, TILE_Q=8, TILE_H=8, TILE_W=8),
    "not by TMA": dict(tma=False),
    "narrow stores": dict(store_bytes=2),
    "narrow loads": dict(load_bytes=1),
    "a long loop": dict(loop_instructions=200),
    "loads of the sum of dy are waited for": dict(waits=True),
    "an SM has no room for its programs": dict(shared=200 * 1024),
    "narrow accesses": dict(accesses=[["load of 8 x 2 bytes", [2, 16]]]),
    "no time for the memory": dict(instructions=5000),
}


def doctored(row, what):
    constants = {k: DOCTORED[what].get(k, v) for k, v in row["constants"].items()}
    return row | DOCTORED[what] | {"constants": constants}


@pytest.mark.core
def test_every_bar_is_of_a_launch_and_can_be_missed(worker):
    rows = [row for t in compile_facts.TARGETS for row in rows_of(worker.launches(t), read(t))]
    known = {(row["group"], target) for row in rows for target in (row["target"], None)}
    if not rows:
        pytest.skip(f"triton {triton.__version__} has no facts")
    for bars in compile_bars.BARS:
        for target in bars.targets or [None]:
            if not any((group, target) in known for group in bars.groups):
                continue
            under = [row for row in rows if bars.hold_for(row) and target in (None, row["target"])]
            for what in bars.missed:
                found = (compile_bars.problems(doctored(row, what)) for row in under)
                assert any(what in each for each in found), f"no launch can miss: {what}: {bars}"


LAUNCH = dict(
    target="sm_90", group="default", case="a case", dtype="float16", tile=None, kernel="a_kernel",
    constants={}, options={}, key="abc",
)  # fmt: skip
FACT = dict(kernel="a_kernel", spills=0, shared=1024, dots=0, tensor_cores=[])


@pytest.mark.parametrize(
    "committed, compiled, ci, message",
    [
        (FACT, FACT, "1", None),
        (FACT | {"shared": 2048}, FACT, "", "shared was 2048, is 1024"),
        (None, FACT, "1", f"1 launches have no fact: {COMMAND}"),
        (None, FACT, "", None),
        (None, FACT | {"spills": 8}, "", "spills: a_kernel for sm_90"),
        (None, {"error": "CompilationError: no"}, "", "does not compile: a_kernel .*Error: no"),
        (FACT, {"error": "CompilationError: no"}, "", "does not compile: a_kernel .*Error: no"),
    ],
)
def test_what_the_compiler_says_is_compared(committed, compiled, ci, message, monkeypatch):
    known = {"another key": FACT} | ({"abc": committed} if committed else {})
    other = LAUNCH | {"key": "another key"}
    worker = types.SimpleNamespace(
        launches=lambda target: [LAUNCH, other],
        fact=lambda target, key: compiled if key == "abc" else FACT,
    )
    monkeypatch.setattr(sys.modules[__name__], "read", lambda target: known)
    monkeypatch.setitem(SHARDS, "sm_90", 1)
    monkeypatch.setitem(os.environ, "CI", ci)
    seeds = [str(seed) for seed in range(9)]  # of which some choose the one, some the other
    with contextlib.ExitStack() as stack:
        if message:
            stack.enter_context(pytest.raises(AssertionError, match=message))
        for seed in seeds:
            monkeypatch.setattr(sys.modules[__name__], "SEED", seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                test_what_has_no_fact_and_a_thirtieth_of_the_rest_compile("sm_90", 0, worker)


KERNEL = """
import triton, triton.language as tl
LIMIT = tl.constexpr(3)
WIDTH = 4

@triton.jit
def helper(x):
    return x + LIMIT

@triton.jit
def a_kernel(x_ptr, N, BLOCK: tl.constexpr):
    \"""Words.\"""
    offs = tl.arange(0, BLOCK)  # words
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(x_ptr + offs, helper(x) * WIDTH, mask=offs < N)
"""


@pytest.mark.parametrize(
    "old, new, changes",
    [
        ("# words", "# other words", False),
        ("Words.", "Other words.", False),
        ("\n@triton.jit\ndef a", "\n\n# more\n@triton.jit\ndef a", False),
        ("offs < N)\n    tl", "offs <= N)\n    tl", True),
        ("x + LIMIT", "x - LIMIT", True),
        ("constexpr(3)", "constexpr(4)", True),
        ("WIDTH = 4", "WIDTH = 5", True),
        ("@triton.jit\ndef a", "@triton.jit(noinline=True)\ndef a", True),
    ],
)
def test_a_key_is_of_what_a_kernel_computes(old, new, changes, tmp_path):
    """And not of the words around it."""
    assert KERNEL.count(old) == 1
    found = []
    for i, text in enumerate([KERNEL, KERNEL.replace(old, new)]):
        path = tmp_path / f"written_{i}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(compile_facts.source_hash(module.a_kernel))
    assert (found[0] != found[1]) == changes


NARROW = """
import torch, triton, triton.language as tl
from tilelab.kernels import _launch
from tilelab.perf.compiler import aot
from tests.tools import compile_facts

@triton.jit
def copy_kernel(x_ptr, y_ptr, N, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < N)

aot.compile_for("sm_90")
x = torch.empty(4096, dtype=torch.bfloat16)
for N, stride, BLOCK in [(4096, 1, 1024), (4096, 2, 1024), (4095, 1, 1024), (4096, 1, 512)]:
    meta = dict(BLOCK=BLOCK, num_warps=4)
    launch = _launch.Launch(copy_kernel, (4,), (x, x, N, stride), meta)
    print([widths for _, widths in compile_facts.fact_of(launch)["accesses"]])
"""


@pytest.mark.core
def test_narrow_accesses_are_seen(tmp_path):
    """A copy: as it should be; strided; of a length that no vector divides; 4 elements a thread."""
    path = tmp_path / "narrow.py"
    path.write_text(NARROW)
    result = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(pathlib.Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        [[16], [16]], [[2], [16]], [[2], [2]], [[8], [8]]
    ]  # fmt: skip


@pytest.mark.slow
def test_the_facts_that_calls_choose_by_are_what_triton_makes():
    """Of every kernel by its source, and of one tile of each target by compiling it again."""
    command = [sys.executable, "-m", "tests.tools.tile_facts"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]

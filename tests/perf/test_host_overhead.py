"""perf/clock/host_overhead.py, and the bound on what the kernels' checks and tile look-ups may cost."""

import contextlib
import functools
import json

import pytest
from tilelab.perf.clock import host_overhead
from tilelab.perf.clock.host_overhead import _child, _imports, _run, measure
from tilelab.perf.errors import PerfError

LIMIT = 10.0  # us a call for checks, the tile look-up and descriptors together
LIMITS = {"matmul": LIMIT, "conv2d": 11.0}  # whose geometry is checked and planned besides
# The limit holds on a machine where plain Python takes this long for `yardstick` (us). On a slower
# one it grows as much; on a faster one it stays.
YARDSTICK = 2.8
TRIES = 5  # some seconds apart: a machine that others use is slow for a while
CHILD = """
import json
from tilelab.perf.clock import host_overhead
def yardstick():
    total = 0
    for i in range(100):
        total += i * i
    return total
before = min(host_overhead._microseconds(yardstick, 10))
costs = host_overhead._calls(20, "matmul", "conv2d")
print(json.dumps([max(before, min(host_overhead._microseconds(yardstick, 10))), costs]))
"""


@functools.cache
def calls(attempt=0):
    """The yardstick, and the least cost of each part of two ops; measured once an attempt."""
    yardstick, costs = _run(CHILD, TRITON_INTERPRET="0")
    return yardstick, {name: m.get("least") for name, m in costs.items()}


@pytest.mark.parametrize("op", ["matmul", "conv2d"])
def test_checks_and_tile_look_up_are_cheap(op):
    """Of the best of twenty repeats, in CPU time: what else runs here does not count."""
    parts = ("checks", "tile look-up", "descriptors")  # the last of what loads by TMA
    for attempt in range(TRIES):
        yardstick, least = calls(attempt)
        assert least[f"{op}: descriptors"] > 0.5
        cost = sum(least.get(f"{op}: {part}", 0.0) for part in parts)
        limit = LIMITS[op] * max(1.0, yardstick / YARDSTICK)
        if cost <= limit:
            return
    pytest.fail(f"{cost:.1f} us, where {limit:.1f} are allowed")


@pytest.mark.parametrize("op", ["matmul", "conv2d"])
def test_the_parts_make_the_call(op):
    """None of them is nothing, and together they are the whole: within what a repeat varies."""
    for attempt in range(TRIES):
        _, least = calls(attempt)
        parts = [least[f"{op}: {part}"] for part in ("checks", "tile look-up", "dispatch", "rest")]
        assert all(part > 0.5 for part in parts)
        call = least[f"{op}: call"]
        more = least[f"{op}: call with gradients"], least[f"{op}: backward"]
        if 0.6 < sum(parts) / call < 1.4 and min(more) > call:
            return
    pytest.fail(f"parts of {parts} us, a call of {call}, with gradients and backward {more}")


def test_a_slow_look_up_would_be_seen():
    """The table has 200 shapes for what the op looks up: without its cache that is seen at once."""
    code = """
import json
from tilelab.kernels import _tiles
_tiles._nearest_tile = _tiles._nearest_tile.__wrapped__
_tiles.forget_tuned = lambda: None
from tilelab.perf.clock import host_overhead
print(json.dumps(host_overhead._calls(1, "matmul")))
"""
    costs = _run(code, TRITON_INTERPRET="0")
    assert costs["matmul: tile look-up"]["least"] > 5 * LIMIT


def test_what_needs_a_gpu_is_not_measured():
    _, least = calls()
    assert least["launch: by the driver"] is None
    assert 0 < least["launch: before Triton"] < 1000


@pytest.mark.slow
def test_imports():
    """perf itself imports nothing; kernels load torch._dynamo, as their first call would."""
    found = {name: m["value"] for name, m in _imports(1).items()}
    assert list(found) == [
        "import tilelab.kernels", "import tilelab.kernels, after torch._dynamo",
        "import tilelab.nets.train", "import tilelab.perf"
    ]  # fmt: skip
    assert found["import tilelab.perf"] < 0.1
    assert found["import tilelab.kernels, after torch._dynamo"] < found["import tilelab.kernels"]


@pytest.mark.slow
def test_interpreted_calls_and_first_calls():
    found = measure(repeats=1, parts=("interpreted", "compile"))
    for op in ("matmul", "conv2d", "softmax"):
        assert 0.1 < found[f"{op}: interpreted"]["value"] < 10_000  # ms
        full = found[f"{op}: first call, full cache"]["value"]
        assert 0 < 5 * full < found[f"{op}: first call, empty cache"]["value"]
        assert 1 < found[f"{op}: launch by Triton"]["value"] < 1000
    assert {m["unit"] for m in found.values()} == {"ms", "s", "us"}
    json.dumps(found)


@pytest.mark.parametrize("options", [dict(parts=("call",)), dict(repeats=0), dict(parts="calls")])
def test_refuses(options):
    with pytest.raises(PerfError, match="parts must be of calls, interpreted, imports, compile"):
        measure(**options)


def test_a_process_that_fails_is_one_line():
    with pytest.raises(PerfError, match="^measuring the host failed: ValueError: no such op$"):
        _run("raise ValueError('no such op')")
    with pytest.raises(PerfError, match="AttributeError: .*_no_such_part"):
        _child("no_such_part()")


def test_microseconds_are_of_one_call(monkeypatch):
    monkeypatch.setattr(host_overhead, "_cpu_time", lambda fn, number: number * 3000)  # ns
    assert host_overhead._microseconds(lambda: None, 4) == [3.0] * 4


def test_several_are_measured_in_rounds(monkeypatch):
    order = []
    monkeypatch.setattr(
        host_overhead, "_cpu_time", lambda fn, number: order.append(fn()) or 2e7 * number
    )
    fns = [(lambda name=name: name, contextlib.nullcontext) for name in "ab"]
    assert host_overhead._in_turn(3, *fns) == [[2e4] * 3] * 2
    assert "".join(order) == "ab" + "ab" * 3


def test_what_is_left_without_a_part():
    """Medians without the part's median, least without its least: not one without the other."""
    left = host_overhead._entry([9.0, 7.0, 20.0], "us", "", without=[2.0, 5.0, 3.0])
    assert (left["value"], left["least"]) == (9.0 - 3.0, 7.0 - 2.0)


def test_the_readme_has_the_committed_measurement():
    """The table of what a call costs, from perf/results/cpu/doctor.json and not from memory."""
    root = host_overhead.ROOT
    findings = json.loads((root / "perf/results/cpu/doctor.json").read_text())["findings"]
    values = {f["title"].removeprefix("host "): f["value"] for f in findings}
    assert host_overhead.markdown(values) in (root / "README.md").read_text()

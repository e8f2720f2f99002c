"""Launches on the machine: what a user passes, what comes back, and that planted faults are found.

The kernels are a user's own. Each fault is looked for at the line that has it.
"""

import inspect
import json
import re
import types

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.tools.on_machine import OnMachine
from tilelab import kernels
from tilelab.__main__ import main
from tilelab.kernels._tiles import use_tile
from tilelab.perf import machine
from tilelab.perf.errors import PerfError
from tilelab.perf.machine import compiler

TARGETS = ("sm_80", "sm_90")


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, scale, BLOCK: tl.constexpr = 64):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask, other=0.0)
    y = tl.load(y_ptr + offs, mask, other=0.0)
    tl.store(out_ptr + offs, x * scale + y, mask)


@pytest.fixture
def tensors():
    """x, y and room for 100 sums, as add_kernel takes them."""
    generator = torch.Generator().manual_seed(0)
    return *torch.randn(2, 100, generator=generator).unbind(), torch.full((100,), torch.nan)


def line_of(kernel, text):
    """How a report names the line of a kernel that has this text."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (at,) = (first + i for i, line in enumerate(lines) if text in line)
    return f"{__file__}:{at} "


# --- a launch that is right -----------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["lockstep", "random", "late"])
def test_tensors_are_changed_in_place(tensors, target, schedule):
    x, y, out = tensors
    report = machine.run(
        add_kernel, (2,), (x, y, out, 100, 2.5), dict(num_warps=2),
        target=target, schedule=schedule, seed=3,
    )  # fmt: skip
    torch.testing.assert_close(out, x * 2.5 + y)
    assert report.kernel == "add_kernel" and report.grid == (2, 1, 1) and report.threads == 64
    assert report.findings == [] and report.coverage == 1
    assert report.counts["global bytes"] == 3 * 100 * 4
    for word in ("add_kernel", target, schedule, "100%", "nothing is wrong"):
        assert word in str(report)
    assert json.loads(json.dumps(report.as_dict(), default=int))["coverage"] == 1


def test_views_keep_their_places(tensors):
    """A kernel gets the address of a view's first element; what lies around it stays."""
    x, y, out = tensors
    whole = torch.full((300,), 7.0)
    machine.run(add_kernel, (1,), (x[50:], y[1:], whole[101:141], 40, 1.0))
    torch.testing.assert_close(whole[101:141], x[50:90] + y[1:41])
    assert (whole[:101] == 7).all() and (whole[141:] == 7).all()


def test_storages_that_overlap_are_one():
    array = np.arange(64, dtype=np.float32)
    low, high = torch.from_numpy(array[:48]), torch.from_numpy(array[16:])
    machine.run(add_kernel, (1,), (low, high, high, 16, 1.0))  # reads 0 to 31, writes 16 to 31
    assert array[16:32].tolist() == [i + (i + 16) for i in range(16)]
    assert array[:16].tolist() == list(range(16)) and array[32:].tolist() == list(range(32, 64))


@triton.jit
def number_kernel(whole_ptr, real_ptr, a, b, pair, none, half: tl.float16, flag):
    tl.store(whole_ptr, tl.where(flag, a + b, 0))
    tl.store(real_ptr, pair[0] * half + pair[1])


def test_numbers_have_the_width_of_their_type():
    """A negative one, one of 64 bits, a tuple of two kinds, None, a half and a bool."""
    whole, real = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    args = (whole, real, -5, 2**33, (0.25, 16), None, 0.5, True)
    machine.run(number_kernel, (1,), args)
    assert whole.item() == 2**33 - 5 and real.item() == 0.25 * 0.5 + 16


@triton.jit
def table_kernel(table_ptr, out_ptr):
    x_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr + 1))


def test_a_list_of_tensors_is_a_table_of_addresses():
    tensors, out = [torch.tensor([0.0, 1.0 + i]) for i in range(3)], torch.zeros(3)
    machine.run(table_kernel, (3,), (tensors, out))
    assert out.tolist() == [1, 2, 3]


@triton.jit
def copy_kernel(source, target, BLOCK: tl.constexpr):
    at = [0, tl.program_id(0) * BLOCK]
    target.store(at, source.load(at))


@pytest.mark.parametrize("target", TARGETS)
def test_descriptors(target):
    """By TMA, and without it by addresses: the parameters are others."""
    x, y = torch.arange(32.0 * 64).view(32, 64), torch.zeros(32, 64)
    args = [TensorDescriptor.from_tensor(t, [32, 32]) for t in (x, y)]
    report = machine.run(copy_kernel, (2,), args, dict(BLOCK=32), target=target)
    assert torch.equal(x, y) and report.findings == []


def test_an_empty_grid_launches_nothing(tensors):
    report = machine.run(add_kernel, (0,), (*tensors, 100, 1.0))
    assert tensors[2].isnan().all() and not report.executed.any()


def test_every_launch_in_a_context(tensors):
    """A grid that is a function, heuristics, and the first of the tiles to be tuned."""
    configs = [triton.Config(dict(BLOCK=block)) for block in (32, 64)]
    x, y, out = tensors
    heuristics = triton.heuristics({"scale": lambda args: 3.0})
    tuned = triton.autotune(configs, key=["n"])(heuristics(triton.jit(add_kernel.fn)))
    seen = []
    with machine.executing("sm_80", seen=seen.append) as reports:
        tuned[lambda args: (triton.cdiv(args["n"], args["BLOCK"]),)](x, y, out, 100)
        kernels.softmax(x.view(10, 10))
    torch.testing.assert_close(out, x * 3 + y)
    assert [report.kernel for report in reports] == ["add_kernel", "softmax_kernel"]
    assert reports[0].grid == (4, 1, 1) and seen == reports
    with pytest.raises(RuntimeError):  # the GPU that is not here
        add_kernel[(1,)](x, y, out, 100, 1.0)


def test_a_gpu_is_not_given_what_was_compiled_for_the_machine():
    """Triton keeps compiled kernels by a hash, of which the backend's is a part."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend, with_ptxas = CUDABackend(GPUTarget("cuda", 90, 32)), CUDABackend.make_cubin
    real = backend.hash()
    with compiler.compiling("sm_90"):
        assert CUDABackend.make_cubin is not with_ptxas and backend.hash() != real
    assert CUDABackend.make_cubin is with_ptxas and backend.hash() == real


# --- what is wrong at a call ----------------------------------------------------------------------


def wrong(change):
    """The arguments of a right launch with something changed."""
    x = torch.zeros(100)
    call = dict(kernel=add_kernel, grid=(2,), args=(x, x, x.clone(), 100, 1.0), meta={})
    return call | change


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target="sm_100"), "target must be sm_80 or sm_90, got 'sm_100'"),
        (dict(seed=-1), "seed must be 0 or more, got -1"),
        (dict(schedule="quick"), "schedule must be one of lockstep, random, late, got 'quick'"),
        (dict(kernel=add_kernel.fn), "must be a function under @triton.jit"),
        (dict(grid=3), r"a grid is one to three integers, as \(4, 1\), got 3"),
        (dict(grid=(2.5,)), "one to three integers"),
        (dict(grid=()), "one to three sizes"),
        (dict(grid=(1, 1, 1, 1)), "one to three sizes"),
        (dict(grid=(-1,)), "from 0 to"),
        (dict(grid=(1, 70_000)), "from 0 to"),
        (dict(args=(torch.zeros(1),)), "add_kernel.*missing a required argument: 'y_ptr'"),
        (dict(meta=dict(n=1)), "multiple values for argument 'n'"),
        (dict(meta=dict(BLOK=1)), "add_kernel: .*BLOK.* unrecognised"),
        (dict(args=(np.zeros(1),) * 3 + (1, 1.0)), "add_kernel: .*ndarray"),
        (dict(args=(torch.zeros(1, device="meta"),) * 3 + (1, 1.0)), "x_ptr is on meta"),
        (dict(meta=dict(num_ctas=2)), "clusters of 2 CTAs: not supported"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_wrong_input_is_said_in_one_line(change, message):
    call = wrong(change)
    with pytest.raises(PerfError, match=message) as raised:
        machine.run(call.pop("kernel"), call.pop("grid"), call.pop("args"), **call)
    assert "\n" not in str(raised.value)


def test_what_does_not_fit_an_sm():
    call = wrong(dict(meta=dict(num_warps=64)))
    with pytest.raises(OutOfResources, match="threads, Required: 2048, Hardware limit: 1024"):
        machine.run(call["kernel"], call["grid"], call["args"], call["meta"])


def test_a_process_that_interprets_is_told_what_to_set(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(PerfError, match="set TRITON_INTERPRET=0 in the environment"):
        machine.run(add_kernel, (1,))


# --- planted faults -------------------------------------------------------------------------------


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # the fault
    tl.store(out_ptr + offs, x, offs < n)


@pytest.mark.parametrize("target", TARGETS)
def test_out_of_bounds(target):
    x, out = torch.zeros(100), torch.zeros(100)
    with pytest.raises(machine.MachineFault) as raised:
        machine.run(unmasked_kernel, (2,), (x, out, 100, 64), target=target)
    text = str(raised.value)
    assert "unmasked_kernel, program (1, 0, 0), thread 36" in text  # 64 + 36 = 100
    assert "out of bounds: global access of 4 bytes" in text and "x_ptr (400 bytes)" in text
    assert line_of(unmasked_kernel, "# the fault") in text and "ld.global" in text


@triton.jit
def misaligned_kernel(x_ptr, out_ptr):
    word_ptr = (x_ptr + 1).to(tl.pointer_type(tl.int32))
    tl.store(out_ptr, tl.load(word_ptr))  # the fault


def test_misaligned():
    with pytest.raises(machine.MachineFault, match="not aligned, byte 1 of x_ptr") as raised:
        machine.run(
            misaligned_kernel, (1,),
            (torch.zeros(64, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)),
        )  # fmt: skip
    assert line_of(misaligned_kernel, "# the fault") in str(raised.value)


@triton.jit
def race_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(0), 1.0)  # written
    tl.store(out_ptr + 8, tl.load(out_ptr + (tl.program_id(0) + 1) % 4))  # read


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_a_race_of_programs(schedule):
    """Program i reads what program i + 1 writes."""
    report = machine.run(race_kernel, (4,), (torch.zeros(9),), schedule=schedule)
    races = [finding for finding in report.findings if finding.kind == "race"]
    assert races and len(races) == len(report.findings)
    written, read = (line_of(race_kernel, text) for text in ("# written", "# read"))
    found = [re.findall(r"\S+:\d+ ", f"{finding.where}\n{finding.other}") for finding in races]
    assert {written, read} in map(set, found)
    assert all(str(finding) in str(report).replace("\n  ", "\n") for finding in races)


# --- the same launch in other orders --------------------------------------------------------------


@triton.jit
def ticket_kernel(ticket_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.atomic_add(ticket_ptr + 0 * offs, 1))


@triton.jit
def sum_kernel(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(sum_ptr + 0 * offs, tl.load(x_ptr + offs))


def repeated(kernel, *args, repeat=6):
    with machine.executing("sm_90", repeat=repeat) as reports:
        kernel[1,](*args, BLOCK=128)
    return reports[0]


def test_who_comes_first_decides():
    """No race, since tickets are drawn by atomic operations: but each run is another one."""
    ticket, out = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    assert not repeated(ticket_kernel, ticket.clone(), out, repeat=0).findings
    first = out.clone()
    report = repeated(ticket_kernel, ticket, out)
    assert {finding.kind for finding in report.findings} == {"depends on the order of warps"}
    assert all("bytes of out_ptr have other bits" in f.message for f in report.findings)
    # The tensors are what one run has made of them.
    assert ticket.item() == 128 and torch.equal(out, first)


def test_who_comes_first_does_not_matter(tensors):
    """All runs begin with the same memory, and end with it; a sum of floats by atomics need not."""
    x, y, out = tensors
    with machine.executing("sm_80", repeat=3) as reports:
        add_kernel[2,](out, x, out, 100, 0.0, num_warps=2)  # in place
        sum_kernel[1,](x, y, BLOCK=64)
    assert [report.findings for report in reports] == [[], []]
    once = machine.run(add_kernel, (2,), (x, x, out, 100, 1.0), dict(num_warps=2), target="sm_80")
    assert reports[0].executed.sum() == 4 * once.executed.sum()


MEET_256 = tl.constexpr("bar.sync 1, 256; mov.b32 $0, $1;")


@triton.jit
def stuck_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    x = tl.inline_asm_elementwise(MEET_256, "=r,r", [x], tl.float32, False, 1)  # the fault
    tl.store(x_ptr + offs, x)


@pytest.mark.parametrize("schedule", ["lockstep", "random", "late"])
def test_a_deadlock(schedule):
    """128 threads wait at a barrier for 256."""
    with pytest.raises(machine.MachineFault, match="deadlock") as raised:
        machine.run(stuck_kernel, (1,), (torch.zeros(128), 128), schedule=schedule)
    assert "stuck_kernel" in str(raised.value)
    assert line_of(stuck_kernel, "# the fault") in str(raised.value)


# --- pytest --on ----------------------------------------------------------------------------------


def call(plugin, kernel, *args):
    """A test that launches a kernel, as pytest calls it with the plugin."""
    plugin.reports.clear()
    around = plugin.pytest_runtest_call(None)
    next(around)
    kernel[(4,)](*args)
    with pytest.raises(StopIteration):
        around.send(None)


def test_a_finding_fails_the_test_that_has_it(tensors):
    plugin = OnMachine("sm_90", "random", 0)
    plugin.pytest_sessionstart()
    try:
        call(plugin, add_kernel, *tensors, 100, 1.0)
        with pytest.raises(AssertionError, match="race: "):
            call(plugin, race_kernel, torch.zeros(9))
        call(plugin, add_kernel, *tensors, 100, 2.0)
    finally:
        plugin.pytest_sessionfinish(types.SimpleNamespace(config=None))
    heading, *rows = (line.split() for line in str(plugin.coverage).splitlines())
    assert heading[:4] == ["launches", "variants", "each", "together"]
    assert rows[0][:5] + rows[0][6:] == ["2", "1", "100.0%", "100.0%", "0", "add_kernel"]
    assert rows[1][0] == "1" and int(rows[1][4]) > 0 and rows[1][6] == "race_kernel"


def refused(message):
    raise ValueError(message)


@pytest.mark.parametrize("target", TARGETS)
def test_what_cannot_be_executed_is_skipped(target):
    """With the reason: nothing to launch, another GPU's kernel, a forced tile that does not fit."""
    x = torch.randn(300, 300).half()
    big = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=9)
    tma = "the tma kernel of matmul cannot take these operands"

    def product(tile):
        with use_tile("matmul", tile):
            kernels.matmul(x, x)

    def skipped(test, *args):
        plugin.reports.clear()
        around = plugin.pytest_runtest_call(None)
        next(around)
        with pytest.raises(pytest.skip.Exception) as found:
            try:
                test(*args)
            except BaseException as e:
                around.throw(e)
            around.send(None)
        return str(found.value)

    plugin = OnMachine(target, "random", 0)
    plugin.pytest_sessionstart()
    try:
        assert skipped(lambda: None) == "launches no kernel"
        assert "the tile does not fit: " in skipped(product, big)
        assert skipped(refused, "a must be int8 on this GPU") == "a must be int8 on this GPU"
        if target == "sm_80":
            assert skipped(refused, tma) == tma
        else:
            with pytest.raises(ValueError):
                skipped(refused, tma)
    finally:
        plugin.pytest_sessionfinish(types.SimpleNamespace(config=None))


# --- tilelab run-ptx ------------------------------------------------------------------------------

FILE = """
import torch, triton, triton.language as tl

DEVICE = triton.runtime.driver.active.get_active_torch_device()

@triton.jit
def fill_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 1.0, offs < n)

def right():
    x, y = torch.zeros(50, device=DEVICE), torch.zeros(50, device="cuda").cuda()
    assert y.is_cuda and torch.zeros(1).to(torch.device("cuda:0")).is_cuda
    for t in x, y:
        fill_kernel[(2,)](t, 50, BLOCK=32)
    torch.cuda.synchronize()
    assert (x == 1).all() and (y == 1).all()

def wrong():
    right()
    fill_kernel[(2,)](torch.zeros(50, device=DEVICE), 51, BLOCK=32)

def on_meta():
    fill_kernel[(2,)](torch.zeros(50, device="meta"), 50, BLOCK=32)

def main(x):
    right()

if __name__ == "__main__":
    right()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fill.py"
    path.write_text(FILE)
    return path


def test_the_command_runs_a_file(file, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main(["run-ptx", str(file), "--target", "sm_80", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fill_kernel on sm_80" in printed and "2 launches, 0 findings" in printed
    launch, _ = json.loads(out.read_text())["launches"]
    assert launch["kernel"] == "fill_kernel" and launch["coverage"] == 1


def test_the_command_runs_a_function_and_names_a_fault(file, capsys):
    assert main(["run-ptx", f"{file}:wrong", "--schedule", "random", "--seed", "2"]) == 1
    printed = capsys.readouterr().out
    assert "2 launches, 0 findings, 1 fault" in printed
    assert "fault: fill_kernel, program (1, 0, 0), thread 18" in printed  # 32 + 18 = 50
    assert "fill.py:9 " in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.py"], "there is no file nowhere.py"),
        (["{}:left"], "fill.py has no function left"),
        (["{}:main"], "fill.py:main is called without arguments: missing a required argument: 'x'"),
        (["{}:tl"], "fill.py has no function tl"),
        (["{}:on_meta"], "x_ptr is on meta: the machine takes dense tensors on the CPU"),
        (["{}", "--target", "sm_100"], "target must be sm_80 or sm_90, got 'sm_100'"),
        (["{}", "--schedule", "quick"], "schedule must be one of lockstep, random, late, got"),
        (["{}", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["{}", "--seed", "-1"], "seed must be 0 or more, got -1"),
        (["{}", "--json", "nowhere/r.json"], "--json: there is no folder nowhere"),
    ],
)
def test_wrong_words(file, capsys, words, message):
    assert main(["run-ptx", *(word.format(file) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1

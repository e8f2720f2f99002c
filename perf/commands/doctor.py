"""`tilelab doctor`: what is here, how fast it is, what is missing, and what to do about it.

On a GPU it measures the ceilings: the peak speeds that everything else is compared with. It also
checks whether a measurement can be trusted there. Does the clock fall under load? Does somebody
else use the GPU? Do rotated inputs really defeat the cache? Without a GPU it says what works all
the same. It changes nothing.

Each finding has a level:

    ok        as it should be
    note      good to know
    warning   numbers will be worse, or some will be missing; the detail says what to do
    error     nothing can be measured, or not trusted; the exit status is then 1
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import statistics
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch

from tilelab.perf.clock import timing
from tilelab.perf.clock.devices import HostDevice, current_device, first_line
from tilelab.perf.commands import provenance
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results
from tilelab.perf.work import gpus

LEVELS = ("ok", "note", "warning", "error")
SLOW_COPY = 0.75  # of the data sheet's bandwidth; HBM gives about 0.9
SLOW_MATMUL = 0.6  # of its peak; cuBLAS at 8192^3 gives about 0.8 within the power limit
TOO_FAST = 1.05  # of any data sheet: then the clock is wrong
SPREAD = 0.02  # between the quartiles of one kernel's samples
SETTINGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        level: one of LEVELS.
        title: what was looked at.
        detail: what was found, and what to do if something is wrong.
        value: the number, if there is one.
        unit: of the value.
    """

    level: str
    title: str
    detail: str
    value: float | None = None
    unit: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", metavar="FILE", help="write the findings to FILE as well")
    parser.add_argument("--quick", action="store_true", help="measure no ceilings: a few seconds")
    parser.add_argument("--host", action="store_true", help="measure what a call costs on the host")


def run(args: argparse.Namespace) -> int:
    """Look, print, and return the exit status: 1 if there is an error among the findings."""
    try:
        device, broken = current_device(), None
    except Exception as error:  # torch says that there is a GPU, and it does not start
        device, broken = HostDevice(), first_line(error)
    findings = examine(device, quick=args.quick, host=args.host)
    if broken:
        detail = f"torch sees a GPU that does not start: {broken}"
        findings.insert(0, Finding("error", "GPU", detail))
    print("\n".join(lines(findings)))
    if args.json:
        found = {"findings": [finding._asdict() for finding in findings]}
        results.write_whole(pathlib.Path(args.json), f"{json.dumps(found, indent=1)}\n".encode())
    return int(any(finding.level == "error" for finding in findings))


def lines(findings: list[Finding]) -> list[str]:
    """The findings for people, and a sentence that counts them."""
    width = max(len(finding.title) for finding in findings)
    out = [f"{f.level:7}  {f.title:{width}}  {f.detail}" for f in findings]
    count = {level: sum(f.level == level for f in findings) for level in LEVELS}
    verdict = "Ready." if not count["error"] else "What is measured here cannot be trusted yet."
    return [*out, "", f"{verdict} Errors: {count['error']}, warnings: {count['warning']}."]


def examine(device: Any, quick: bool = False, host: bool = False) -> list[Finding]:
    """Look at everything; return the findings in the order in which they are to be read.

    Args:
        device: of perf/clock/devices.py, or with its methods.
        quick: leave out what takes more than a few seconds.
        host: measure what a call costs on the host too.
    """
    findings = _software()
    if device.timer_name == "host":
        findings += [*_no_gpu(), *_interpreter()]
    else:
        findings += _gpu(device)
        works = _works(device)
        findings.append(works)
        if works.level != "error" and not quick:
            with device.stream():
                findings += _measured(device)
            if device.torch_device == "cuda":
                findings += _peers()
    return findings + (_host() if host else [])


# -------------------------------------------------------------------------------------------------
# Software.
# -------------------------------------------------------------------------------------------------


def _software() -> list[Finding]:
    found = provenance.versions()
    text = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "numpy", "triton"))
    try:
        importlib.import_module("tilelab.kernels")  # refuses pairs of versions that do not work
    except ImportError as error:
        return [Finding("error", "versions", f"{text}; the kernels cannot be imported: {error}")]
    built = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built = built or (torch.version.hip and f"ROCm {torch.version.hip}") or "the CPU alone"
    return [Finding("ok", "versions", f"{text}; torch is built for {built}")]


# -------------------------------------------------------------------------------------------------
# Without a GPU.
# -------------------------------------------------------------------------------------------------


def _no_gpu() -> list[Finding]:
    """Why there is none: by choice, by the build of torch, or because something is broken."""
    if torch.cuda.is_available():
        detail = "there is one, but TRITON_INTERPRET=1 asks for the CPU: unset it to measure"
        return [Finding("note", "GPU", detail)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if _driver() and not hidden:
        built = torch.version.cuda or torch.version.hip
        why = "torch cannot use it" if built else "this build of torch is for the CPU alone"
        todo = "install a build of torch for CUDA"
        if built:
            todo = f"see whether nvidia-smi works, and the driver is new enough for CUDA {built}"
        return [Finding("error", "GPU", f"the machine has NVIDIA's driver, but {why}: {todo}")]
    why = "CUDA_VISIBLE_DEVICES hides them" if hidden else "torch sees none"
    return [Finding("note", "GPU", f"{why}, so no kernel can be timed here")]


def _driver() -> bool:
    return os.path.exists("/proc/driver/nvidia/version")


def _interpreter() -> list[Finding]:
    """Whether the CPU can run a kernel, which the sweep's dry runs and the tests need."""
    targets = ", ".join(gpus.TARGETS)
    compiles = Finding("ok", "without a GPU", f"`tilelab compile` compiles for {targets}")
    try:
        kernels = importlib.import_module("tilelab.kernels")
        x, bias = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([0.5, -5.0])
        right = torch.equal(kernels.bias_relu(x, bias), torch.relu(x + bias))
    except Exception as error:
        detail = f"a kernel does not run in Triton's interpreter: {first_line(error)}"
        return [compiles, Finding("error", "interpreter", detail)]
    if not right:
        detail = "a kernel gives a wrong result in Triton's interpreter"
        return [compiles, Finding("error", "interpreter", detail)]
    detail = "kernels run on the CPU, for tests and dry runs; their times mean nothing"
    return [compiles, Finding("ok", "interpreter", detail)]


# -------------------------------------------------------------------------------------------------
# The GPU.
# -------------------------------------------------------------------------------------------------


def _gpu(device: Any) -> list[Finding]:
    header = device.header()
    memory = f"{device.memory_total / 1e9:.0f} GB, {device.l2 / 2**20:.0f} MiB of L2"
    driver = f", driver {header['driver']}" if header["driver"] else ""
    found = [Finding("ok", "GPU", f"{device.name} ({device.target}), {memory}{driver}")]
    gpu = gpus.find_device(device.name)
    if gpu is None:
        detail = f"{device.name} is not in perf/work/gpus.py: shares of its peak are left out."
        known = f" Known: {', '.join(gpus.GPUS)}"
        found.append(Finding("warning", "data sheet", detail + known))
    else:
        found.append(Finding("ok", "data sheet", f"{gpu.title}: {gpu.source}"))
    if device.nvml_missing:
        detail = f"{device.nvml_missing}: clocks, throttling and energy are not recorded"
        todo = "" if device.target.startswith("gfx") else ". pip install nvidia-ml-py"
        found.append(Finding("warning", "NVML", detail + todo))
    else:
        clocks, watts = header["clocks_mhz"], header["power_limit_w"]
        most = f"SM clock up to {clocks['sm_max']} MHz" if clocks else "no clocks"
        limit = f"power limit {watts:.0f} W" if watts else "no power limit"
        counter = "energy counter" if device.energy_j() is not None else "no energy counter"
        found.append(Finding("ok", "NVML", f"{most}, {limit}, {counter}"))
    return found + _shared(device)


def _shared(device: Any) -> list[Finding]:
    processes, used = device.processes(), device.memory_total - device.memory_free()
    memory = f"{used / 1e9:.1f} GB of its memory are in use"
    if processes is not None and processes > 1:
        detail = f"{processes} processes compute on this GPU, and {memory}: times will be disturbed"
        return [Finding("warning", "shared", detail, processes, "processes")]
    if used > 0.05 * device.memory_total:
        detail = f"{memory}: another process may compute on it"
        return [Finding("warning", "shared", detail, used / 1e9, "GB")]
    return [Finding("ok", "shared", f"nobody else is seen on it; {memory}")]


def _works(device: Any) -> Finding:
    """Whether the GPU does anything at all, and how it is timed."""
    try:
        with device.stream():
            x = torch.ones(2**16, device=device.torch_device)
            runner = device.prepare([functools.partial(torch.add, x, 1)])
        seconds = statistics.median(timing.screen(device, runner))
        timer, reason, late = runner.timer, runner.reason, runner.late
        runner.close()
    except Exception as error:
        detail = f"the GPU is visible but fails: {first_line(error)}"
        return Finding("error", "a small kernel", detail)
    micro, detail = seconds * 1e6, f"{seconds * 1e6:.1f} µs, timed with {timer}"
    if late:
        detail += ": the host is too slow to hide its own time, which makes such times too long"
        return Finding("warning", "a small kernel", detail, micro, "µs")
    if timer == "events":
        detail += f": {reason or 'it is slow'}"
        return Finding("warning", "a small kernel", detail, micro, "µs")
    return Finding("ok", "a small kernel", detail, micro, "µs")


def _measured(device: Any) -> list[Finding]:
    """The ceilings, each against the data sheet, and whether they can be trusted."""
    gpu = gpus.find_device(device.name)
    steps: list[Callable[[], list[Finding]]] = [lambda: _copy(device, gpu)]
    steps += [functools.partial(_matmul, device, gpu, kind) for kind in SETTINGS]
    steps.append(lambda: _rotation(device, gpu))
    found = []
    for step in steps:
        try:
            found += step()
        except Exception as error:  # no memory left, say: the other steps may still work
            detail = f"a measurement failed: {first_line(error)}"
            found.append(Finding("error", "measuring", detail))
    return found


def _share(title: str, detail: str, rate: float, peak: float | None, least: float, unit: str):
    """A ceiling against the data sheet."""
    value = rate / 1e12
    if peak is None:
        return Finding("note", title, detail, value, unit)
    share = rate / peak
    detail += f", {share:.0%} of the data sheet's {peak / 1e12:.4g}"
    if share > TOO_FAST:
        return Finding("error", title, f"{detail}: times are too short, do not trust", value, unit)
    if share < least:
        detail += f": under {least:.0%} something holds this GPU back, or shares it"
        return Finding("warning", title, detail, value, unit)
    return Finding("ok", title, detail, value, unit)


def _copy(device: Any, gpu: gpus.GPU | None) -> list[Finding]:
    """The memory's bandwidth: a large copy, bytes read and written both counted."""
    size = min(2**30, device.memory_free() // 4)
    source, to = (torch.empty(size, dtype=torch.uint8, device=device.torch_device) for _ in "ab")
    source.random_()
    with closing(
        device.prepare([functools.partial(torch.Tensor.copy_, to, source)], "cold")
    ) as runner:
        timing.warm(device, runner)
        seconds = statistics.median(timing.screen(device, runner, 0.2))
    rate = 2 * size / seconds
    detail = f"{rate / 1e12:.2f} TB/s, read and written"
    return [_share("copy", detail, rate, gpu and gpu.bandwidth, SLOW_COPY, "TB/s")]


def _matmul(device: Any, gpu: gpus.GPU | None, kind: str) -> list[Finding]:
    """The rate of cuBLAS on random numbers: zeros need less power, and so run faster than data."""
    size = 8192 if device.memory_free() > 4e9 else 2048
    dtype = SETTINGS[kind]
    a, b = (torch.empty(size, size, dtype=dtype, device=device.torch_device) for _ in "ab")
    a.uniform_(-1, 1), b.uniform_(-1, 1)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        with closing(device.prepare([functools.partial(torch.matmul, a, b)], "cold")) as runner:
            timing.warm(device, runner)
            samples, clocks, reasons = _under_load(device, runner)
    finally:
        switch.fp32_precision = before
    rate = 2 * size**3 / statistics.median(samples)
    detail = f"{rate / 1e12:.0f} TFLOP/s of {kind}, {size}^3"
    peak = gpu and gpu.peak(kind)
    found = [_share(f"matmul {kind}", detail, rate, peak, SLOW_MATMUL, "TFLOP/s")]
    if kind == "bf16":
        found += [*_throttling(device, clocks, reasons), _steady(samples)]
    return found


def _under_load(device: Any, runner: Any, seconds: float = 1.0) -> tuple[list, list, set]:
    """Samples, SM clocks and reasons to throttle, of a second of work."""
    samples, clocks, reasons, began = [], [], set(), device.now()
    while device.now() - began < seconds or len(samples) < 5:
        samples.append(runner.sample())
        clock = device.clock_mhz()
        clocks += [] if clock is None else [clock]
        reasons.update(device.throttle_reasons())
    return samples, clocks, reasons


def _throttling(device: Any, clocks: list[float], reasons: set[str]) -> list[Finding]:
    if device.nvml_missing or not clocks:
        return []
    clock = statistics.median(clocks)
    most = (device.header()["clocks_mhz"] or {}).get("sm_max")
    detail = f"SM clock {clock:.0f} MHz under load" + (f", of {most}" if most else "")
    if not reasons:
        return [Finding("ok", "throttling", detail, clock, "MHz")]
    detail += f"; held back by: {', '.join(sorted(reasons))}"
    if reasons == {"power cap"}:
        detail += ". Large products run at the power limit: rows are flagged, and comparable here"
        return [Finding("note", "throttling", detail, clock, "MHz")]
    detail += ". Such rows are flagged: cool the GPU, or ask who set its limits"
    return [Finding("warning", "throttling", detail, clock, "MHz")]


def _steady(samples: list[float]) -> Finding:
    q25, median, q75 = np.quantile(samples, [0.25, 0.5, 0.75])
    spread = float((q75 - q25) / median)
    detail = f"the middle half of {len(samples)} samples lies within {spread:.2%} of the median"
    if spread > SPREAD:
        detail += ": somebody else uses the GPU, or its clock wanders; small differences are lost"
    return Finding("warning" if spread > SPREAD else "ok", "steadiness", detail, spread * 100, "%")


def _rotation(device: Any, gpu: gpus.GPU | None) -> list[Finding]:
    """Read and write a quarter of the L2, hot and through rotated sets.

    What comes from the cache may be faster than the memory, what is called cold may not: otherwise
    the rotation does not work, and every "cold" row would be wrong.
    """
    if not device.l2:
        return [Finding("warning", "rotation", "the size of the L2 is not known: rows are hot")]
    size = device.l2 // 8
    sets = timing.sets_needed(2 * size, device.l2)

    def call() -> Callable[[], Any]:
        x = torch.ones(size // 4, device=device.torch_device)
        return functools.partial(torch.neg, x, out=torch.empty_like(x))

    rates = {}
    for cache, count in (("hot", 1), ("cold", sets.count)):
        with closing(device.prepare([call() for _ in range(count)], cache)) as runner:
            rates[cache] = 2 * size / statistics.median(timing.screen(device, runner, 0.1)) / 1e12
    hot, cold = rates["hot"], rates["cold"]
    detail = f"{2 * size / 2**20:.0f} MiB hot {hot:.2f} TB/s, in {sets.count} sets {cold:.2f} TB/s"
    if gpu is None:
        return [Finding("note", "rotation", detail, cold, "TB/s")]
    if cold > TOO_FAST * gpu.bandwidth / 1e12:
        detail += ": faster than the memory, so rows that say cold are not"
        return [Finding("error", "rotation", detail, cold, "TB/s")]
    if hot < 1.1 * cold:
        detail += ": hot is no faster, so this cannot show whether the rotation works"
        return [Finding("note", "rotation", detail, cold, "TB/s")]
    return [Finding("ok", "rotation", f"{detail}: the cache is defeated", cold, "TB/s")]


def _peers() -> list[Finding]:
    """With what the kernels can be compared here."""
    found = []
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if cudnn is None:
        detail = "not in this build of torch: convolutions have no peer worth the name"
        found.append(Finding("warning", "cuDNN", detail))
    else:
        found.append(Finding("ok", "cuDNN", f"version {cudnn}"))
    try:
        x = torch.ones(64, device="cuda")
        right = torch.compile(lambda x: torch.relu(x) * 2 + 1)(x).sum().item() == 64 * 3
        ok = "" if right else "it gives a wrong result"
    except Exception as error:
        ok = first_line(error)
    detail = f"does not work, the peers compile and inductor are left out: {ok}" if ok else "works"
    found.append(Finding("warning" if ok else "ok", "torch.compile", detail))
    return found


def _host() -> list[Finding]:
    """What a call costs before the GPU hears of it."""
    try:
        measured = importlib.import_module("tilelab.perf.clock.host_overhead").measure()
    except (ImportError, PerfError) as error:
        return [Finding("warning", "host", f"was not measured: {first_line(error)}")]
    found = []
    for name, (cost, unit) in measured.items():
        found.append(Finding("note", f"host {name}", f"{cost:.4g} {unit}", cost, unit))
    return found

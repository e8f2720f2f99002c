"""What the doctor says of simulated GPUs, healthy and not, and of this machine."""

import argparse
import json
import os

import numpy as np
import pytest
import torch

from tests.tools.fake_device import BrokenGPU, FakeDevice
from tilelab.perf.clock.devices import HostDevice
from tilelab.perf.commands import doctor
from tilelab.perf.commands.doctor import LEVELS, Finding, examine, lines
from tilelab.perf.errors import PerfError

H200 = dict(bandwidth=4.3e12, bf16=790e12, fp16=780e12, tf32=420e12)


class FakeGPU(FakeDevice):
    """A GPU that needs as long as its rates say, with a cache that keeps what the last call used.

    Args:
        rates: bytes/s and FLOP/s; "cache": bytes/s of what is in the L2.
        leaks: whether the rotation fails to defeat the cache.
        other: as FakeDevice's.
    """

    def __init__(self, leaks=False, cache=9e12, rates=H200, **other):
        super().__init__(self.seconds, **({"torch_device": "meta"} | other))
        self.rates, self.cache, self.leaks, self.last = rates, cache, leaks, None

    def seconds(self, call):
        cached, self.last = call is self.last or self.leaks, call
        name = call.func.__name__
        if name == "matmul":
            a, b = call.args
            kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(a.dtype)
            if kind is None:
                kind = torch.backends.cuda.matmul.fp32_precision
            return 2 * a.shape[0] * a.shape[1] * b.shape[1] / self.rates.get(kind, 50e12)
        size = sum(
            t.nbytes for t in [*call.args[:2], *call.keywords.values()] if hasattr(t, "nbytes")
        )
        rate = self.cache if cached and size < self.l2 else self.rates["bandwidth"]
        return 1e-6 + size / rate


def of(findings, title):
    (finding,) = [finding for finding in findings if finding.title == title]
    return finding


def test_a_healthy_gpu():
    findings = examine(FakeGPU(noise=0.002))
    assert [f.title for f in findings] == [
        "versions", "GPU", "data sheet", "NVML", "shared",
        "a small kernel", "copy", "matmul bf16", "throttling", "matmul fp16",
        "matmul tf32", "rotation",
    ]  # fmt: skip
    assert {f.level for f in findings} == {"ok"}
    copy, matmul = of(findings, "copy"), of(findings, "matmul bf16")
    assert copy.value == pytest.approx(4.3, rel=0.01) and copy.unit == "TB/s"
    assert "89% of the data sheet's 4.8" in copy.detail
    assert matmul.value == pytest.approx(790, rel=0.01) and "80% of" in matmul.detail
    assert of(findings, "matmul tf32").value == pytest.approx(420, rel=0.01)  # and not ieee's 50
    assert "580.0" in of(findings, "GPU").detail and "700 W" in of(findings, "NVML").detail
    assert of(findings, "throttling").detail == "SM clock 1980 MHz under load, of 1980"


def test_everything_is_given_back():
    device = FakeGPU()
    before = torch.backends.cuda.matmul.fp32_precision
    examine(device)
    assert device.open_runners == 0
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_quick_measures_no_ceilings():
    device = FakeGPU()
    titles = {f.title for f in examine(device, quick=True)}
    assert "a small kernel" in titles and not titles & {"copy", "matmul bf16", "rotation"}
    assert device.now() < 0.1


@pytest.mark.parametrize(
    "change, title, level, words",
    [
        (dict(rates=H200 | {"bandwidth": 2e12}), "copy", "warning", "holds this GPU back"),
        (dict(rates=H200 | {"bandwidth": 6e12}), "copy", "error", "do not trust"),
        (dict(rates=H200 | {"bf16": 400e12}), "matmul bf16", "warning", "under 60%"),
        (dict(rates=H200 | {"tf32": 700e12}), "matmul tf32", "error", "times are too short"),
        (dict(leaks=True), "rotation", "error", "rows that say cold are not"),
        (dict(cache=4e12), "rotation", "note", "cannot show"),
        (dict(l2=0), "rotation", "warning", "not known"),
        (dict(process_count=3), "shared", "warning", "3 processes"),
        (dict(memory_free=lambda: 100e9), "shared", "warning", "41.0 GB"),
        (dict(throttle=["power cap"]), "throttling", "note", "held back by: power cap"),
        (dict(throttle=["thermal (hardware)"]), "throttling", "warning", "cool the GPU"),
        (dict(name="NVIDIA H200 NVL"), "data sheet", "warning", "not in perf/work/gpus.py"),
        (dict(name="NVIDIA H200 NVL"), "copy", "note", "4.29 TB/s"),
        (dict(nvml_missing="nvidia-ml-py is not installed"), "NVML", "warning", "pip install"),
        (dict(timer="events"), "a small kernel", "warning", "timed with events"),
        (dict(late=1), "a small kernel", "warning", "host is too slow"),
        (dict(watts=None), "NVML", "ok", "no energy counter"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen_and_nothing_else_is(change, title, level, words):
    findings = examine(FakeGPU(**change))
    finding = of(findings, title)
    assert finding.level == level and words in finding.detail
    if "name" not in change and "l2" not in change:
        others = {f.title for f in findings if f.level in ("warning", "error")} - {title}
        assert not others - ({"rotation"} if title == "copy" else set())


def test_without_nvml_nothing_is_said_of_clocks():
    findings = examine(FakeGPU(nvml_missing="gone", clock_mhz=None, watts=None, process_count=None))
    assert "throttling" not in {f.title for f in findings}
    assert of(findings, "shared").level == "ok" and of(findings, "copy").level == "ok"


def test_an_amd_gpu():
    device = FakeGPU(
        name="AMD Instinct MI300X", target="gfx942", l2=256 << 20, memory_total=192 * 10**9,
        nvml_missing="AMD's GPUs have no NVML", clock_mhz=None, watts=None,
        rates=dict(bandwidth=4.5e12, bf16=900e12, fp16=900e12, tf32=450e12), cache=14e12,
    )  # fmt: skip
    findings = examine(device)
    assert [f.title for f in findings if f.level != "ok"] == ["NVML"]
    assert "pip" not in of(findings, "NVML").detail


def test_a_gpu_that_fails_is_an_error_and_is_not_measured():
    def broken(call):
        raise BrokenGPU("CUDA error: no kernel image is available for execution on the device")

    device = FakeGPU()
    device.times = broken
    findings = examine(device)
    finding = findings[-1]
    assert finding.level == "error" and finding.title == "a small kernel"
    assert "visible but fails: BrokenGPU: CUDA error: no kernel image" in finding.detail


def test_a_measurement_that_fails_does_not_end_the_others():
    device = FakeGPU()
    seconds = device.times
    device.times = lambda call: (
        1 / 0 if call.func.__name__ == "matmul" and call.args[0].element_size() == 4
        else seconds(call)
    )  # fmt: skip
    findings = examine(device)
    assert of(findings, "measuring").detail == (
        "a measurement failed: ZeroDivisionError: division by zero"
    )
    assert of(findings, "rotation").level == "ok"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"  # as the tests set it


def test_little_memory_is_enough():
    device = FakeGPU(memory_total=3 * 10**9)
    findings = examine(device)
    assert "2048^3" in of(findings, "matmul bf16").detail


# This machine, and what is missing.


def test_the_host_is_told_what_works_there(monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = examine(HostDevice())
    assert of(findings, "GPU").level == "note"
    assert "sm_90" in of(findings, "without a GPU").detail
    assert of(findings, "interpreter").level == "ok"
    assert {f.level for f in findings} <= {"ok", "note", "warning"}


@pytest.mark.parametrize(
    "cuda, visible, level, words",
    [
        (None, None, "error", "install a build of torch for CUDA"),
        ("13.0", None, "error", "new enough for CUDA 13.0"),
        ("13.0", "", "note", "CUDA_VISIBLE_DEVICES hides"),
        ("13.0", "-1", "note", "CUDA_VISIBLE_DEVICES hides"),
    ],
)
def test_a_driver_that_torch_cannot_use(monkeypatch, cuda, visible, level, words):
    monkeypatch.setattr(doctor, "_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = doctor._no_gpu()
    assert finding.level == level and words in finding.detail


def test_the_interpreter_by_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (finding,) = doctor._no_gpu()
    assert finding.level == "note" and "unset it" in finding.detail


def test_an_interpreter_that_is_wrong(monkeypatch):
    from tilelab import kernels

    monkeypatch.setattr(kernels, "bias_relu", lambda x, bias: x)
    assert "wrong result" in doctor._interpreter()[-1].detail
    monkeypatch.setattr(kernels, "bias_relu", lambda x, bias: 1 / 0)
    assert doctor._interpreter()[-1].level == "error"


def test_versions_that_do_not_go_together(monkeypatch):
    def importing(name):
        raise ImportError("triton 3.6.0's interpreter fails on loops with NumPy 2.4: pip install")

    monkeypatch.setattr(doctor.importlib, "import_module", importing)
    (finding,) = doctor._software()
    assert finding.level == "error" and "pip install" in finding.detail


def test_the_host_cost_is_measured_when_asked(monkeypatch):
    asked = []

    class Module:
        @staticmethod
        def measure():
            asked.append(True)
            return {"matmul fwd": (41.53, "µs")}

    original = doctor.importlib.import_module
    monkeypatch.setattr(
        doctor.importlib,
        "import_module",
        lambda n: Module if n == "tilelab.perf.clock.host_overhead" else original(n),
    )
    assert not asked and "host matmul fwd" not in {f.title for f in examine(FakeGPU(), quick=True)}
    findings = examine(FakeGPU(), quick=True, host=True)
    assert asked and of(findings, "host matmul fwd").value == 41.53
    assert of(findings, "host matmul fwd").detail == "41.53 µs"

    def fails():
        raise PerfError("no")

    monkeypatch.setattr(Module, "measure", fails)
    assert of(examine(FakeGPU(), quick=True, host=True), "host").level == "warning"


# The command.


def command(monkeypatch, device, *argv):
    monkeypatch.setattr(doctor, "current_device", lambda: device)
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(argv))


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    path = tmp_path / "findings.json"
    assert command(monkeypatch, FakeGPU(), "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "ok       copy" in printed and printed.endswith("Ready. Errors: 0, warnings: 0.\n")
    findings = json.loads(path.read_text())["findings"]
    assert set(findings[0]) == {"level", "title", "detail", "value", "unit"}
    assert len(findings) == len(printed.splitlines()) - 2
    assert os.listdir(tmp_path) == ["findings.json"]
    with pytest.raises(PerfError, match="cannot write"):
        command(monkeypatch, FakeGPU(), "--quick", "--json", str(path / "f.json"))


def test_the_exit_status_is_1_when_nothing_can_be_trusted(monkeypatch, capsys):
    assert command(monkeypatch, FakeGPU(leaks=True)) == 1
    assert "cannot be trusted" in capsys.readouterr().out
    assert command(monkeypatch, FakeGPU(process_count=3)) == 0  # a warning is none


def test_a_gpu_that_does_not_start(monkeypatch, capsys):
    def fails():
        raise RuntimeError("CUDA driver initialization failed\nand more")

    monkeypatch.setattr(doctor, "current_device", fails)
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(["--quick"])) == 1
    assert "does not start: RuntimeError: CUDA driver init" in capsys.readouterr().out


def test_lines_have_a_level_each():
    findings = [Finding(level, "t" * n, "d") for n, level in enumerate(LEVELS, 1)]
    table = lines(findings)
    assert len(table) == 6 and len({line.rindex("d") for line in table[:4]}) == 1
    assert "Errors: 1, warnings: 1." in table[-1]


def test_numbers_are_plain():
    for finding in examine(FakeGPU()):
        assert finding.value is None or type(finding.value) in (int, float)
        assert "\n" not in finding.detail and not isinstance(finding.value, np.generic)


@pytest.mark.gpu
def test_gpu_examined_for_real():
    findings = examine(doctor.current_device())
    assert not [f for f in findings if f.level == "error"], lines(findings)

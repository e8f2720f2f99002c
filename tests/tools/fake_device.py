"""A simulated GPU with a simulated clock: it tests the rules of when to measure and when to stop.

It has the methods of perf/clock/devices.py. No call is executed: `times` says how long each takes,
and the clock advances by that much. So a race of fifteen seconds takes milliseconds.

    FakeDevice(1e-3)                                     every call takes a millisecond
    FakeDevice(lambda call: call.seconds, noise=0.01)    each its own time, with 1% of noise
    FakeDevice(1e-3, factor=lambda now: 1 + 0.01 * now)  slower and slower: 1% a second
    FakeDevice(1e-3, throttle=lambda now: ["power cap"] if now > 3 else [])

`times` may raise, as a kernel would. Any exception makes that runner fail; `BrokenGPU` breaks the
device for every runner after it. `record` lists the calls in the order in which they were run.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.tools.inputs import DEVICE
from tilelab.perf.clock.devices import SAMPLE, cache_label


class BrokenGPU(RuntimeError):
    """Stands for an illegal access: from then on everything on the GPU fails."""


def constant(value: Any) -> Callable[..., Any]:
    return value if callable(value) else lambda *_: value


class FakeDevice:
    """A device whose properties and behaviour are arguments.

    Args:
        times: seconds of a call, or a function of the call.
        noise: standard deviation of a call's time, as a part of it (log-normal).
        factor: by what times are multiplied, or a function of the clock: drift, a slow spell.
        clock_mhz: of the SMs, or a function of the clock; None for a GPU without NVML.
        throttle: the reasons, or a function of the clock.
        watts: power, or None for a GPU without a counter; the counter moves every 0.1 s.
        timer: what the runners say that they use.
        torch_device: where tensors are made: "meta" costs nothing.
        execute: whether calls are executed too, as sweeps with real results need.
        seed: of the noise.
        properties: anything else that a device has: name, target, l2, memory_total, ...
    """

    timer_name = "events"
    nvml_missing = None

    def __init__(
        self,
        times: float | Callable[[Any], float] = 1e-3,
        *,
        noise: float = 0.0,
        factor: float | Callable[[float], float] = 1.0,
        clock_mhz: float | None | Callable[[float], float | None] = 1980,
        throttle: Sequence[str] | Callable[[float], list[str]] = (),
        watts: float | None = 500.0,
        timer: str = "graph",
        torch_device: str = DEVICE,
        execute: bool = False,
        seed: int = 0,
        **properties: Any,
    ) -> None:
        self.name, self.target = "NVIDIA H200", "sm_90"
        self.l2, self.memory_total = 50 * 2**20, 141 * 10**9
        self.torch_device, self.timer, self.execute = torch_device, timer, execute
        self.times, self.factor = constant(times), constant(factor)
        self._clock, self._throttle, self.watts = constant(clock_mhz), constant(throttle), watts
        self.noise, self.random = noise, np.random.default_rng(seed)
        self.time, self.broken, self.record, self.open_runners = 0.0, False, [], 0
        self.process_count: int | None = 1
        self.late = 0  # samples that each runner says may hold time of the host
        for name, value in properties.items():
            setattr(self, name, value)

    def header(self) -> dict[str, Any]:
        clocks = {"sm": self.clock_mhz(), "memory": 3201, "sm_max": 1980}
        return {
            "gpu": self.name,
            "target": self.target,
            "driver": "580.0",
            "clocks_mhz": clocks if clocks["sm"] is not None else None,
            "power_limit_w": 700.0,
        }

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, calls: Sequence[Any], cache: str | None = None) -> "FakeRunner":
        return FakeRunner(self, calls, cache)

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def now(self) -> float:
        return self.time

    def memory_free(self) -> int:
        return self.memory_total

    def processes(self) -> int | None:
        return self.process_count

    def clock_mhz(self) -> float | None:
        return self._clock(self.time)

    def throttle_reasons(self) -> list[str]:
        return list(self._throttle(self.time))

    def energy_j(self) -> float | None:
        return None if self.watts is None else self.watts * math.floor(self.time * 10) / 10

    def spend(self, call: Any) -> float:
        """Run one call: the seconds that it took."""
        self.synchronize()
        if self.execute:
            call()
        try:
            seconds = self.times(call)
        except BrokenGPU:
            self.broken = True
            raise
        seconds *= self.factor(self.time) * math.exp(self.noise * self.random.standard_normal())
        self.time += seconds
        self.record.append(call)
        return seconds


class FakeRunner:
    """Runs as many calls for a sample as take about a millisecond, over all of them in turn."""

    reason = None

    def __init__(self, device: FakeDevice, calls: Sequence[Any], cache: str | None) -> None:
        self.cache, self.timer = cache_label(calls, cache), device.timer
        self.device, self.calls, self.turn = device, list(calls), 0
        self.late = device.late
        first = device.spend(self.calls[0])
        self.count = max(1, math.ceil(SAMPLE / first))
        device.open_runners += 1
        self.closed = False

    def sample(self) -> float:
        return self._run() / self.count

    def run(self) -> int:
        self._run()
        return self.count

    def _run(self) -> float:
        assert not self.closed, "a runner that was closed is used"
        spent = 0.0
        for _ in range(self.count):
            spent += self.device.spend(self.calls[self.turn % len(self.calls)])
            self.turn += 1
        return spent

    def close(self) -> None:
        if not self.closed:
            self.device.open_runners -= 1
        self.closed = True

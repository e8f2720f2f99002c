"""How often to measure, and when to stop: the rules of timing, for any device of devices.py.

One workload goes through these steps, on runners that `device.prepare` made:

    sets_needed   how many sets of inputs to rotate through: the cache must be cold
    warm          works until the clock of the GPU is steady
    screen        times each of many candidates for about 20 ms; most are dropped
    race          times the few that are left, in rounds, until their medians are known to 0.5%
    energy        measures joules per call of the winners

In a race every runner runs once in every round, in a new random order. A falling clock or a
neighbour on the machine disturbs a whole round. So times are compared round by round (the paired
ratio of perf/rows/stats.py), and no sample is thrown away. This file does not know what is
measured.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tilelab.perf.clock.devices import first_line
from tilelab.perf.rows import stats


@dataclass(frozen=True)
class Rules:
    """When a race ends: after the least rounds and seconds, or after `most` seconds."""

    rounds: int = 20
    seconds: float = 0.5
    most: float = 15.0  # who is not settled then is marked noisy
    precision: float = 0.005  # half the width of the median's 95% interval, as a part of it
    few: int = 6  # with 5 samples there is no such interval: in 1 of 16 cases all are on one side


@dataclass
class Timed:
    """What a race knows of one runner."""

    timer: str
    cache: str
    samples: list[float] = field(default_factory=list)  # seconds per call, one for each round
    throttled: list[int] = field(default_factory=list)  # rounds in which the GPU was held back
    reasons: list[str] = field(default_factory=list)  # that it gave, over all those rounds
    noisy: bool = True  # the median is not known as well as the rules ask
    note: str | None = None  # why it is noisy
    error: str | None = None  # what the runner raised, in one line; its samples end there
    clock_mhz: float | None = None  # median of the SM clock after the samples


class Sets(NamedTuple):
    """How many sets of inputs to make, and whether that leaves the cache cold."""

    count: int
    cold: bool


def sets_needed(bytes_of_one_set: int, l2: int, most: int = 512) -> Sets:
    """Return how many sets of inputs, used in turn, hold at least twice what the L2 cache holds.

    Twice, because no cache drops exactly the oldest line first. What a call reads and writes is one
    set. Very small inputs would need more than `most` sets: they are hot, as where `l2` is 0.
    """
    if l2 <= 0 or bytes_of_one_set <= 0:
        return Sets(1, False)
    count = math.ceil(2 * l2 / bytes_of_one_set)
    return Sets(count, True) if count <= most else Sets(1, False)


def warm(
    device: Any, runner: Any, tolerance: float = 0.01, steady: float = 1.0, most: float = 5.0
) -> bool:
    """Keep the GPU busy until its clock has stayed within 1% for a second; 5 s at most.

    A GPU that was idle runs slowly at first, and one that is cool runs faster than it will. Where
    the clock cannot be read, a second of work has to do; on the host one call is enough. It returns
    whether the clock was seen to be steady.
    """
    began = device.now()
    if runner.timer == "host":
        runner.run()
        return False
    readings = []  # (time, MHz): those of the last `steady` seconds, and one before
    while True:
        clock = _busy(device, runner)
        now = device.now()
        if clock is None:
            if now - began >= steady:
                return False
        else:
            readings.append((now, clock))
            while len(readings) > 1 and readings[1][0] <= now - steady:
                del readings[0]
            clocks = [mhz for _, mhz in readings]
            same = max(clocks) - min(clocks) <= tolerance * max(clocks)
            if same and now - readings[0][0] >= steady:
                return True
        if now - began >= most:
            return False


def _busy(device: Any, runner: Any, seconds: float = 0.02) -> float | None:
    """Give the GPU some 20 ms of work, read its clock while it is at it, and wait."""
    began = device.now()
    runner.run()
    clock = device.clock_mhz()
    device.synchronize()
    while device.now() - began < seconds:
        runner.run()
        device.synchronize()
    return clock


def screen(device: Any, runner: Any, seconds: float = 0.02) -> list[float]:
    """Time one candidate for about 20 ms: seconds per call, at least one sample.

    Three samples at least, so that their median survives one that was disturbed, unless a sample
    takes so long that disturbances do not matter.
    """
    began, samples = device.now(), []
    while True:
        samples.append(runner.sample())
        spent = device.now() - began
        if spent >= (seconds if len(samples) >= 3 else 5 * seconds):
            return samples


def race(
    device: Any,
    runners: dict[str, Any],
    rng: Any,
    rules: Rules | None = None,
    deadline: float | None = None,
) -> dict[str, Timed]:
    """Time runners in the same rounds until the median of each is known well enough.

    `rng` is anything with `shuffle(list)`. The deadline is on the clock of `device.now()`: who is
    not settled then is marked noisy. A runner that raises leaves the race with its error, and the
    others go on. If it broke the GPU itself, which no process survives, the race ends there, and
    `note` says so of those who were not settled.
    """
    rules = rules or Rules()
    results = {name: Timed(runner.timer, runner.cache) for name, runner in runners.items()}
    clocks: dict[str, list[float]] = {name: [] for name in runners}
    began, rounds, check, why = device.now(), 0, rules.few, None
    while why is None and _racing(results):
        why = _round(device, runners, rng, results, clocks, rounds, deadline)
        rounds += 1
        spent = device.now() - began
        if why is None and deadline is not None and device.now() >= deadline:
            why = "the time given ran out"
        if why is None and spent >= rules.most:
            why = f"not settled after {rules.most:g} s"
        if why is None and rounds >= max(check, rules.rounds) and spent >= rules.seconds:
            # A bootstrap takes as long as some rounds do: check every fifth more, not every one.
            check = math.ceil(rounds * 1.2)
            if all(_settled(result, rules) for result in _racing(results)):
                break
    for name, result in results.items():
        settled = result.error is None and _settled(result, rules)
        result.noisy, result.note = not settled, None if settled else why
        result.clock_mhz = statistics.median(clocks[name]) if clocks[name] else None
    return results


def _racing(results: dict[str, Timed]) -> list[Timed]:
    return [result for result in results.values() if result.error is None]


def _settled(result: Timed, rules: Rules) -> bool:
    """Whether the 95% interval of the median lies within the precision around it."""
    if len(result.samples) < rules.few:
        return False
    low, high = stats.bootstrap_median(result.samples)
    median = statistics.median(result.samples)
    return max(high - median, median - low) <= rules.precision * median


def _round(
    device: Any,
    runners: dict[str, Any],
    rng: Any,
    results: dict[str, Timed],
    clocks: dict[str, list[float]],
    number: int,
    deadline: float | None,
) -> str | None:
    """Everybody once, in random order. Returns why the race has to end, or None."""
    order = [name for name in runners if results[name].error is None]
    rng.shuffle(order)
    times: dict[str, float] = {}
    held_back: set[str] = set()
    for name in order:
        if number and deadline is not None and device.now() >= deadline:
            return "the time given ran out"  # a round that is not whole cannot be paired
        try:
            times[name] = runners[name].sample()
        except Exception as error:
            results[name].error = first_line(error)
            try:
                device.synchronize()
            except Exception:  # after an illegal access every call to the GPU fails
                return f"{name} broke the GPU"
            continue
        clock = device.clock_mhz()
        if clock is not None:
            clocks[name].append(clock)
        held_back.update(device.throttle_reasons())
    for name, seconds in times.items():
        result = results[name]
        result.samples.append(seconds)
        if held_back:
            result.throttled.append(number)
            result.reasons = sorted({*result.reasons, *held_back})
    return None


def energy(device: Any, runner: Any, seconds: float = 5.0) -> float | None:
    """Joules per call, of the whole board: its idle power and its memory are in it.

    The counter moves in steps, some 10 a second. So the time runs from one step to another, of at
    least `seconds`. It is None where the GPU has no counter, or one that stands still.
    """
    once = runner.sample() * runner.run()
    device.synchronize()
    batch = min(20, math.ceil(0.02 / max(once, 1e-3)))  # queued ahead, so that the GPU never waits
    start = _step(device, runner, batch)
    if start is None:
        return None
    began, calls = device.now(), 0
    while device.now() - began < seconds:
        calls += _burst(device, runner, batch)
    end = _step(device, runner, batch)
    return None if end is None else (end[0] - start[0]) / (calls + end[1])


def _burst(device: Any, runner: Any, batch: int) -> int:
    """Run so many samples' worth of calls: how many calls they were."""
    calls = sum(runner.run() for _ in range(batch))
    device.synchronize()
    return calls


def _step(device: Any, runner: Any, batch: int, most: float = 2.0) -> tuple[float, int] | None:
    """Run until the energy counter moves: its new value, and the calls on the way."""
    before, began, calls = device.energy_j(), device.now(), 0
    while before is not None and device.now() - began < most:
        calls += _burst(device, runner, batch)
        after = device.energy_j()
        if after is not None and after != before:
            return after, calls
    return None

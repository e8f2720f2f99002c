"""The rules of timing, each against a simulated GPU whose true times are known."""

import random
import statistics

import numpy as np
import pytest

from tests.tools.fake_device import BrokenGPU, FakeDevice
from tilelab.perf.clock.timing import Rules, energy, race, screen, sets_needed, warm
from tilelab.perf.rows import stats

TRUE = {"a": 1.00e-3, "b": 1.03e-3, "c": 2e-3}


def runners(device, names="abc"):
    """A runner for each name, whose only call is the name itself."""
    return {name: device.prepare([name]) for name in names}


def a_race(device, names="abc", seed=0, **kwargs):
    return race(device, runners(device, names), random.Random(seed), **kwargs)


# Rule 5: rotation.


@pytest.mark.parametrize(
    "size, l2, count",
    [
        (10, 50, 10),
        (50, 50, 2),
        (99, 50, 2),
        (100, 50, 1),
        (1000, 50, 1),
        (33, 50, 4),
        (1, 50, 100),
    ],
)
def test_sets_hold_twice_the_cache(size, l2, count):
    assert sets_needed(size, l2) == (count, True)
    assert count * size >= 2 * l2 and (count - 1) * size < 2 * l2


def test_sets_of_tiny_inputs_are_called_hot_and_not_half_cold():
    assert sets_needed(1, 50 * 2**20) == (1, False)
    assert sets_needed(10, 500, most=100) == (100, True)
    assert sets_needed(10, 501, most=100) == (1, False)


@pytest.mark.parametrize("size, l2", [(10, 0), (0, 10), (0, 0)])
def test_nothing_is_cold_where_the_cache_or_the_data_are_unknown(size, l2):
    assert sets_needed(size, l2) == (1, False)


# Rule 4: warming up.


def swings(mhz, other):
    """A clock that goes from one to the other five times a second."""
    return lambda now: mhz if int(now * 5) % 2 else other


@pytest.mark.parametrize(
    "clock, steady, least, most",
    [
        # 1980 is reached at 1.635 s, 1% below it 20 ms earlier; then it has to stay for a second.
        (lambda now: min(1980, 345 + 1000 * now), True, 2.6, 2.75),
        (1980, True, 1.0, 1.1),
        (swings(1980, 1965), True, 1.0, 1.1),  # less than one percent
        (swings(1980, 1900), False, 5.0, 5.1),
        (None, False, 1.0, 1.1),  # a second of work has to do
    ],
)
def test_warm_waits_for_a_steady_clock(clock, steady, least, most):
    device = FakeDevice(1e-3, clock_mhz=clock)
    assert warm(device, device.prepare(["a"])) is steady
    assert least <= device.now() <= most


def test_warm_on_the_host_is_one_call():
    device = FakeDevice(3.0, clock_mhz=None, timer="host")
    assert not warm(device, device.prepare(["a"]))
    assert device.now() == pytest.approx(6.0)  # one to prepare, one to warm


# Rule 7: screening.


def test_screening_takes_about_20_ms():
    device = FakeDevice(10e-6, noise=0.01)
    runner = device.prepare(["a"])
    began = device.now()
    samples = screen(device, runner)
    assert 0.02 <= device.now() - began <= 0.022
    assert statistics.median(samples) == pytest.approx(10e-6, rel=0.02)


@pytest.mark.parametrize("seconds, count", [(0.009, 3), (0.03, 3), (0.051, 2), (0.2, 1), (3.0, 1)])
def test_screening_of_slow_candidates_takes_few_samples(seconds, count):
    device = FakeDevice(seconds)
    assert len(screen(device, device.prepare(["a"]))) == count


# Rules 7 and 8: the race.


def test_a_race_finds_the_true_times():
    device = FakeDevice(TRUE.get, noise=0.02)
    results = a_race(device)
    assert list(results) == ["a", "b", "c"]
    for name, result in results.items():
        assert statistics.median(result.samples) == pytest.approx(TRUE[name], rel=0.006)
        assert not result.noisy and result.error is None and result.note is None
        assert result.timer == "graph" and result.cache == "hot" and result.clock_mhz == 1980


def test_a_race_stops_when_all_are_settled_and_not_before():
    device = FakeDevice(TRUE.get, noise=0.05)
    results = a_race(device)
    widths = []
    for result in results.values():
        low, high = stats.bootstrap_median(result.samples)
        median = statistics.median(result.samples)
        widths.append(max(high - median, median - low) / median)
    assert max(widths) <= 0.005
    rounds = len(results["a"].samples)
    earlier = results["a"].samples[: int(rounds / 1.5)]  # checks come every fifth more
    low, high = stats.bootstrap_median(earlier)
    assert rounds > 100 and (high - low) / 2 > 0.004 * statistics.median(earlier)


def test_a_quiet_race_still_takes_20_rounds_and_half_a_second():
    device = FakeDevice(20e-3)  # 20 rounds of 3 take longer than half a second
    began = device.now()
    results = a_race(device)
    assert {len(result.samples) for result in results.values()} == {20}
    device = FakeDevice(1e-3)  # half a second takes longer than 20 rounds
    began = device.now()
    results = a_race(device)
    assert 0.5 <= device.now() - began <= 0.65
    assert 165 <= len(results["a"].samples) <= 210


def test_the_rules_can_be_changed():
    device = FakeDevice(1e-3)
    results = a_race(device, rules=Rules(rounds=7, seconds=0))
    assert len(results["a"].samples) == 7
    device = FakeDevice(1e-3, noise=0.3)
    began = device.now()
    assert a_race(device, rules=Rules(most=2.0))["a"].note == "not settled after 2 s"
    assert 2.0 <= device.now() - began <= 2.1


def test_the_order_of_every_round_is_random():
    device = FakeDevice(20e-3)
    everybody = runners(device, "abcd")
    device.record.clear()
    race(device, everybody, random.Random(0), Rules(rounds=100, seconds=0))
    rounds = [tuple(device.record[i : i + 4]) for i in range(0, len(device.record), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)  # each once a round
    assert len(set(rounds)) >= 20  # of 24 orders
    first = [order[0] for order in rounds]
    assert all(10 <= first.count(name) <= 40 for name in "abcd")


@pytest.mark.parametrize("rng", [random.Random, np.random.default_rng])
def test_a_race_is_the_same_for_the_same_seed(rng):
    def once(seed):
        device = FakeDevice(TRUE.get, noise=0.02, seed=3)
        return race(device, runners(device), rng(seed))

    assert once(5) == once(5)
    assert once(5)["a"].samples != once(6)["a"].samples


def test_drift_cancels_in_the_pairs():
    """A GPU that gets slower on the way: the medians blur, the ratio of each round does not."""
    device = FakeDevice(TRUE.get, noise=0.003, factor=lambda now: 1 + min(0.3, 0.04 * now))
    results = a_race(device, "ab", rules=Rules(rounds=1000, seconds=0, most=3))
    a, b = results["a"].samples, results["b"].samples
    assert len(a) == len(b)
    ratio, low, high = stats.paired_ratio(a, b)
    assert low < TRUE["a"] / TRUE["b"] < high and high - low < 0.002
    spread = np.quantile(a, 0.95) / np.quantile(a, 0.05)
    assert spread > 1.04  # more than the 3% between the two


def test_a_slow_spell_meets_everybody():
    device = FakeDevice(TRUE.get, factor=lambda now: 2.0 if 0.1 < now < 0.13 else 1.0)
    results = a_race(device, "ab")
    slow = {n: [i for i, s in enumerate(r.samples) if s > 1.5e-3] for n, r in results.items()}
    assert len(set(slow["a"]) & set(slow["b"])) >= 6  # kept, and in the same rounds
    assert statistics.median(results["a"].samples) == pytest.approx(1e-3)


def test_what_does_not_settle_in_15_seconds_is_noisy():
    def times(name):
        return TRUE["a"] * (1 if name == "a" else random.Random(len(device.record)).uniform(0.5, 2))

    device = FakeDevice(1e-3)
    device.times = times
    everybody = runners(device, "ab")
    began = device.now()
    results = race(device, everybody, random.Random(0), Rules(precision=0.001))
    assert 15.0 <= device.now() - began <= 15.1
    assert not results["a"].noisy and results["a"].note is None
    assert results["b"].noisy and results["b"].note == "not settled after 15 s"
    assert len(results["a"].samples) == len(results["b"].samples)


@pytest.mark.parametrize("seconds, noisy", [(0.8, False), (2.0, False), (4.0, True), (30.0, True)])
def test_slow_calls_are_judged_by_what_15_seconds_give(seconds, noisy):
    device = FakeDevice(seconds)
    results = a_race(device, "a")
    assert len(results["a"].samples) == max(1, -(-15 // seconds)) or seconds == 0.8
    assert results["a"].noisy is noisy  # six rounds at least


# Rule 10: throttling.


def test_throttled_rounds_are_flagged_and_kept():
    device = FakeDevice(TRUE.get, throttle=lambda now: ["power cap"] if 0.2 < now < 0.3 else [])
    results = a_race(device, "ab")
    assert len(results["a"].samples) == len(results["b"].samples)
    assert 40 <= len(results["a"].throttled) <= 60  # a tenth of a second of rounds of 2 ms
    assert results["a"].throttled == results["b"].throttled  # the round is, not one runner
    assert results["a"].reasons == ["power cap"] and not results["a"].noisy
    device = FakeDevice(TRUE.get)
    assert a_race(device)["a"].throttled == [] and a_race(device)["a"].reasons == []


def test_the_clock_of_each_runner_is_reported():
    device = FakeDevice(TRUE.get, clock_mhz=lambda now: 1500)
    assert a_race(device)["c"].clock_mhz == 1500
    device = FakeDevice(TRUE.get, clock_mhz=None)
    assert a_race(device)["c"].clock_mhz is None


# Budgets and failures.


def test_a_deadline_ends_a_race_and_says_so():
    device = FakeDevice(TRUE.get, noise=0.3)
    everybody = runners(device)
    results = race(device, everybody, random.Random(0), deadline=device.now() + 1.0)
    assert 0.95 <= device.now() <= 1.1
    for result in results.values():
        assert result.noisy and result.note == "the time given ran out"
    assert len({len(result.samples) for result in results.values()}) == 1  # whole rounds only


def test_a_deadline_does_not_wait_for_the_end_of_a_round():
    device = FakeDevice(1.0)
    everybody = runners(device)
    results = race(device, everybody, random.Random(0), deadline=device.now() + 7.5)
    assert device.now() == pytest.approx(3 + 8)
    assert {len(result.samples) for result in results.values()} == {2}  # nor counts half of it


def test_a_deadline_that_is_past_still_gives_one_round():
    device = FakeDevice(TRUE.get)
    results = race(device, runners(device), random.Random(0), deadline=-1.0)
    assert {len(result.samples) for result in results.values()} == {1}
    assert all(result.noisy for result in results.values())


def test_a_deadline_does_not_blame_the_settled():
    device = FakeDevice(1e-3)
    results = race(device, runners(device), random.Random(0), deadline=0.3)
    assert not results["a"].noisy and results["a"].note is None


def failing(device, name, error, after):
    """Let the calls of one runner raise from its so-many-th on."""

    def times(call):
        if call == name and device.record.count(name) >= after:
            raise error
        return TRUE[call]

    device.times = times


def test_a_runner_that_raises_leaves_and_the_others_go_on():
    device = FakeDevice(1e-3)
    failing(device, "b", RuntimeError("CUDA out of memory\nwith details"), 10)
    results = a_race(device)
    assert results["b"].error == "RuntimeError: CUDA out of memory" and results["b"].noisy
    assert 0 < len(results["b"].samples) <= 10
    for name in "ac":
        assert results[name].error is None and not results[name].noisy
        assert len(results[name].samples) > 20
    a, b = results["a"].samples, results["b"].samples
    assert a[: len(b)] == pytest.approx([TRUE["a"]] * len(b))


def test_a_broken_gpu_ends_the_race_and_blames_the_one_who_broke_it():
    device = FakeDevice(1e-3)
    failing(device, "b", BrokenGPU("CUDA error: an illegal memory access"), 10)
    results = a_race(device)
    assert results["b"].error.startswith("BrokenGPU: CUDA error")
    for name in "ac":
        assert results[name].error is None and results[name].samples
        assert results[name].note in ("b broke the GPU", None)
    assert len(results["a"].samples) == len(results["c"].samples) <= 10


def test_a_race_in_which_all_raise_ends():
    device = FakeDevice(1e-3)
    everybody = runners(device)
    device.times = lambda call: 1 / 0
    results = race(device, everybody, random.Random(0))
    assert all(r.error == "ZeroDivisionError: division by zero" for r in results.values())


def test_an_empty_race():
    assert race(FakeDevice(), {}, random.Random(0)) == {}


# Rule 11: energy.


@pytest.mark.parametrize("seconds", [5e-6, 1e-3, 0.3])
def test_energy_per_call(seconds):
    device = FakeDevice(seconds, watts=700.0)
    runner = device.prepare(["a"])
    began = device.now()
    assert energy(device, runner) == pytest.approx(
        700 * seconds, rel=0.03 if seconds < 0.1 else 0.1
    )
    assert 5.0 <= device.now() - began <= 7.5


def test_energy_starts_and_ends_at_a_step_of_the_counter():
    """Without that, a step of 0.1 s would be missing or too much: 10% of a second."""
    device = FakeDevice(1e-3, watts=700.0)
    runner = device.prepare(["a"])
    for _ in range(20):
        device.time += 0.033  # start anywhere between two steps
        assert energy(device, runner, seconds=1.0) == pytest.approx(0.7, rel=0.025)


def test_energy_is_none_without_a_counter():
    device = FakeDevice(1e-3, watts=None)
    assert energy(device, device.prepare(["a"])) is None
    device = FakeDevice(1e-3, watts=0.0)  # one that stands still
    assert energy(device, device.prepare(["a"])) is None
    assert device.now() < 2.2


def test_samples_are_never_dropped():
    device = FakeDevice(TRUE.get, noise=0.02)
    everybody = runners(device)
    device.record.clear()
    results = race(device, everybody, random.Random(0), Rules(seconds=0.2))
    calls = {name: device.record.count(name) for name in TRUE}
    assert calls == {name: len(r.samples) * everybody[name].count for name, r in results.items()}

"""Statistics: against known answers, and the intervals against many simulated runs."""

import time

import numpy as np
import pytest

from tilelab.perf.rows import stats


def lognormal(count, seed, scale=1e-3, spread=0.05):
    """Timings of a kernel of 1 ms: none below a fastest, a tail above."""
    return scale * np.random.default_rng(seed).lognormal(0, spread, count)


def test_summary_of_known_samples():
    found = stats.summary([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (found["q25"], found["median"], found["q75"]) == (2.0, 3.0, 4.0)
    assert found["low"] == 1.0 and found["high"] == 100.0  # five samples know little
    assert stats.summary([1.0, 2.0])["median"] == 1.5  # an even number: between the middle two
    assert all(type(value) is float for value in found.values())  # JSON takes no NumPy numbers


def test_one_sample_and_equal_samples_have_no_width():
    assert stats.bootstrap_median([7.0]) == (7.0, 7.0)
    assert stats.bootstrap_median([3.0] * 40) == (3.0, 3.0)


@pytest.mark.parametrize("wrong", [[], [1.0, np.nan], [np.inf], [[1.0, 2.0]], [None]])
def test_samples_that_are_none(wrong):
    with pytest.raises(ValueError, match="finite"):
        stats.summary(wrong)


@pytest.mark.parametrize("count", [30, 31])
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    """The true median of this noise is 1; 95% of the intervals must hold it, and not all do."""
    hits = 0
    for seed in range(600):
        low, high = stats.bootstrap_median(lognormal(count, seed, scale=1.0))
        hits += low <= 1.0 <= high
    assert 0.92 <= hits / 600 <= 0.975


def test_the_interval_shrinks_with_the_root_of_the_samples():
    widths = []
    for count in (50, 800):
        ends = [stats.bootstrap_median(lognormal(count, seed)) for seed in range(30)]
        widths.append(np.mean([high - low for low, high in ends]))
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)


def test_the_bootstrap_agrees_with_a_plain_one():
    """The shortcut of sorting first against the definition, draw by draw."""
    for count in (1, 2, 7, 10):
        samples = lognormal(count, 3)
        places = np.random.default_rng(0).integers(0, count, (2000, count), dtype=np.uint32)
        plain = np.quantile(np.median(np.sort(samples)[places], axis=1), [0.025, 0.975])
        np.testing.assert_allclose(stats.bootstrap_median(samples), plain, rtol=1e-12)


def test_deterministic_whatever_the_order():
    samples = lognormal(40, 0)
    assert stats.bootstrap_median(samples) == stats.bootstrap_median(samples[::-1])
    state = np.random.get_state()[1].copy()
    stats.summary(samples)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # the caller's are left alone


def test_a_thousand_samples_take_little_time():
    samples = lognormal(1000, 0)
    start = time.perf_counter()
    stats.bootstrap_median(samples)
    assert time.perf_counter() - start < 1  # 0.03 s on an idle core


def test_pairs_see_what_the_spread_hides():
    """A drift of 30% over the rounds hides a difference of 1%, unless round by round."""
    drift = np.linspace(1, 1.3, 40)
    noise = np.random.default_rng(0).normal(1, 1e-3, (2, 40))
    a, b = 1.01 * drift * noise[0], drift * noise[1]
    ratio, low, high = stats.paired_ratio(a, b)
    assert ratio == pytest.approx(1.01, abs=1e-3) and 1.005 < low < ratio < high < 1.015
    _, low, high = stats.unpaired_ratio(a, b)
    assert low < 1 < high


def test_ratios_have_a_direction():
    assert stats.paired_ratio([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)
    assert stats.unpaired_ratio([2.0, 2.0], [1.0, 1.0, 1.0]) == (2.0, 2.0, 2.0)


def test_an_unpaired_ratio_holds_the_true_one_as_often_as_it_says():
    hits = 0
    for seed in range(400):
        a, b = lognormal(30, 2 * seed, scale=1.1), lognormal(40, 2 * seed + 1, scale=1.0)
        _, low, high = stats.unpaired_ratio(a, b)
        hits += low <= 1.1 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_equal_samples_are_drawn_independently():
    """Drawn with the same random numbers, a file compared with itself would seem exact."""
    samples = lognormal(30, 0)
    ratio, low, high = stats.unpaired_ratio(samples, samples)
    assert ratio == 1 and low < 0.99 and high > 1.01


def test_ratios_of_what_cannot_be_compared():
    with pytest.raises(ValueError, match="as many, got 2 and 1"):
        stats.paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive, got 0"):
        stats.paired_ratio([1.0], [0.0])


def test_geomean():
    assert stats.geomean([2.0, 0.5]) == pytest.approx(1.0)
    assert stats.geomean(x for x in (1.0, 10.0, 100.0)) == pytest.approx(10.0)
    for wrong in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError):
            stats.geomean(wrong)

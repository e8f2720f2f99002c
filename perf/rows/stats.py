"""Statistics of repeated timings: medians, their bootstrap intervals, and ratios with intervals.

Timings are not normally distributed: there is a fastest time that the hardware allows, and a tail
of disturbances above it. So the median is reported and not the mean, quartiles and not a standard
deviation, and no sample is thrown away.

The bootstrap says how far the median itself can be trusted. It draws as many samples as there are,
with replacement, takes their median, and does so 2,000 times. The middle 95% of those medians is
the interval. It assumes nothing about the distribution except that the samples are independent. The
random numbers come from a fixed seed: the same samples give the same interval, bit for bit.

No samples, one that is not a finite number, and one of a ratio that is not positive are a
ValueError.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, the percentile
interval; Hoefler and Belli, Scientific Benchmarking of Parallel Computing Systems (2015).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

RESAMPLES = 2000


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return median, q25 and q75 (the quartiles), low and high (the 95% interval of the median)."""
    samples = _checked(samples)
    q25, median, q75 = np.quantile(samples, [0.25, 0.5, 0.75])
    low, high = bootstrap_median(samples)
    return dict(median=float(median), q25=float(q25), q75=float(q75), low=low, high=high)


def bootstrap_median(samples: Sequence[float]) -> tuple[float, float]:
    """Return the interval (low, high) that holds the median with a confidence of 95%.

    One sample says nothing of its own spread: its interval has no width. Below about ten samples
    the interval is too narrow.
    """
    return _interval(_medians(_checked(samples), seed=0))


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of a_i / b_i and its interval's ends; a_i and b_i are of the same round.

    What slows down a whole round (a clock that falls, a neighbour) slows down both, and cancels in
    the ratio of that round. So this sees differences that are lost in the spread of the times.
    """
    a, b = _positive(a), _positive(b)
    if len(a) != len(b):
        raise ValueError(f"paired samples must be as many, got {len(a)} and {len(b)}")
    ratios = a / b
    return float(np.median(ratios)), *bootstrap_median(ratios)


def unpaired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the medians a / b and its interval's ends, of what was timed apart.

    Both are drawn anew independently. It cannot know what else changed between the two runs.
    """
    a, b = _positive(a), _positive(b)
    drawn = _medians(a, seed=0) / _medians(b, seed=1)
    return float(np.median(a) / np.median(b)), *_interval(drawn)


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean, the one that suits ratios: of 2 and 1/2 it is 1."""
    return math.exp(np.log(_positive(list(values))).mean())


def _medians(samples: np.ndarray, seed: int) -> np.ndarray:
    """Return the medians of samples drawn anew, [RESAMPLES]."""
    samples, count, half = np.sort(samples), len(samples), len(samples) // 2
    middle = [half] if count % 2 else [half - 1, half]
    random = np.random.default_rng(seed)
    places = random.integers(0, count, (RESAMPLES, count), dtype=np.uint32)
    # The samples are sorted, so the middle ones of the drawn places are the middle samples.
    places.partition(middle, axis=1)
    return samples[places[:, middle]].mean(axis=1)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the middle 95% of the values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _checked(samples: Sequence[float]) -> np.ndarray:
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise ValueError("samples must be one finite number or more")
    return samples


def _positive(samples: Sequence[float]) -> np.ndarray:
    samples = _checked(samples)
    if samples.min() <= 0:
        raise ValueError(f"samples must be positive, got {samples.min():g}")
    return samples

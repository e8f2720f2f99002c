"""How well predicted times agree with measured ones, in lists of tiles (perf/rows/lists.py).

Two questions are asked, and they have different answers:

    level   Is the time right? The ratio predicted / measured of every tile: its median, the middle
            80%, and the share of tiles that are predicted within 20%.
    order   Is the best tile found? Spearman's rank correlation within a list, and the regret:

                regret = time of the tile that the model picks / time of the list's best tile - 1

A regret says what the choice costs, whatever the level is. Tiles whose predictions differ by less
than 0.1% are a tie: the model is taken to draw one of them. Beside it stand two that know nothing
of the shape: the one tile that is best for all lists on average ("fixed"), and a random one.

Sources: Spearman, The Proof and Measurement of Association between Two Things (1904).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tilelab.perf.rows import ranking, stats
from tilelab.perf.rows.lists import TileList

TIE = 1e-3
NEAR = 0.2  # "within 20%"
LIMITS = (0.05, 0.10, 0.25)  # of the regret, whose shares are reported
REGIMES = (  # by the time of a list's best tile: name, and where it ends, in seconds
    ("under 10 µs", 10e-6),
    ("10 to 30 µs", 30e-6),
    ("30 to 100 µs", 100e-6),
    ("100 µs to 1 ms", 1e-3),
    ("over 1 ms", math.inf),
)
SHARE = 0.9  # of the lists has to have a tile that is called fixed


class Held(NamedTuple):
    """A list beside its prediction.

    Attributes:
        list: its tiles are those that could be predicted.
        measured, predicted: seconds of each tile.
        per_sm: programs of each tile over the GPU's SMs.
        taken: which of them is the tile that a call takes on an untuned GPU of this kind, as a row
            of bools: none if its tile is not among them.
    """

    list: TileList
    measured: np.ndarray
    predicted: np.ndarray
    per_sm: np.ndarray
    taken: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """Predicted over measured time of each tile."""
        return self.predicted / self.measured

    @property
    def regrets(self) -> np.ndarray:
        """The regret of picking each tile."""
        return self.measured / self.measured.min() - 1

    @property
    def picked(self) -> np.ndarray:
        """Which tiles the model may pick: the one that is predicted fastest, and its ties."""
        return self.predicted <= self.predicted.min() * (1 + TIE)

    @property
    def regime(self) -> str:
        """By the time of the best tile."""
        best = self.measured.min()
        return next(name for name, end in REGIMES if best < end)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    ordered = np.sort(values)
    below, upto = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (below + upto + 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, -1 to 1; None if all values of one are equal."""
    a, b = ranks(a), ranks(b)
    if not (a.std() and b.std()):
        return None
    return float(np.corrcoef(a, b)[0, 1])


class Regret(NamedTuple):
    """The regrets of one way to choose a tile: a number a list, and the weight of each.

    A list whose choice is drawn among several tiles has several, which weigh 1 together.
    """

    values: np.ndarray
    weights: np.ndarray

    def share(self, limit: float) -> float:
        """Return the share of lists whose regret is at most `limit`."""
        return float(self.weights[self.values <= limit].sum() / self.weights.sum())

    @property
    def mean(self) -> float:
        """Over the lists."""
        return float(np.average(self.values, weights=self.weights))


def regret_of(held: Sequence[Held], chosen: Callable[[Held], np.ndarray]) -> Regret | None:
    """Return the regret of drawing one of the `chosen` tiles of each list that has any."""
    values = [each.regrets[chosen(each)] for each in held]
    weights = [np.full(len(v), 1 / len(v)) for v in values if len(v)]
    return Regret(np.concatenate(values), np.concatenate(weights)) if weights else None


def is_tile(text: str | None) -> Callable[[Held], np.ndarray]:
    """Return a function that says which tile of a list has this text: one, or none."""
    return lambda each: np.array([ranking.tile_text(tile) == text for tile in each.list.tiles])


def fixed_tile(held: Sequence[Held]) -> str | None:
    """Return the text of the tile with the least mean regret, of those that nearly all lists have.

    It is chosen by the times that it is judged by: it is the best that one tile can do.
    """
    found: dict[str, list[float]] = {}
    for each in held:
        for tile, regret in zip(each.list.tiles, each.regrets, strict=True):
            found.setdefault(ranking.tile_text(tile), []).append(regret)
    common = {text: np.mean(v) for text, v in found.items() if len(v) >= SHARE * len(held)}
    return min(common, key=common.get, default=None)


# -- summaries -------------------------------------------------------------------------------------


def level(ratios: np.ndarray) -> dict[str, Any]:
    """Return how right the times of tiles are, from their predicted / measured."""
    p10, median, p90 = np.quantile(ratios, [0.1, 0.5, 0.9])
    near = float((np.abs(ratios - 1) <= NEAR).mean())
    return {"tiles": len(ratios), "median": median, "p10": p10, "p90": p90, "within_20": near}


def order(held: Sequence[Held], fixed: str | None) -> dict[str, Any]:
    """Return how well the tiles of lists are ranked, and what the choice costs."""
    rhos = [rho for each in held if (rho := spearman(each.measured, each.predicted)) is not None]
    found = {"lists": len(held), "rank_correlation": float(np.median(rhos)) if rhos else None}
    for name, regret in regrets(held, fixed).items():
        found[f"regret_{name}"] = regret and {
            "mean": regret.mean, **{f"within_{100 * x:.0f}": regret.share(x) for x in LIMITS},
            "most": float(regret.values.max()), "lists": round(float(regret.weights.sum())),
        }  # fmt: skip
    return found


def regrets(held: Sequence[Held], fixed: str | None) -> dict[str, Regret | None]:
    """Return the regret of the model's pick, a call's tile, the fixed tile and a random one."""
    return {
        "model": regret_of(held, lambda each: each.picked),
        "call": regret_of(held, lambda each: each.taken),
        "fixed": regret_of(held, is_tile(fixed)),
        "random": regret_of(held, lambda each: np.ones(len(each.measured), dtype=bool)),
    }


def library(held: Sequence[Held], fixed: str | None) -> dict[str, Any] | None:
    """Return speeds over the vendor's library of the same list, as geometric means: above 1 faster.

    Of the lists in which it was timed and which have the fixed tile; None if there are none.
    """
    ways = {
        "model": lambda each: each.picked,
        "call": lambda each: each.taken,
        "fixed": is_tile(fixed),
        "best": lambda each: each.regrets == 0,
    }
    mine = [h for h in held if h.list.library_s and (fixed is None or is_tile(fixed)(h).any())]
    if not mine:
        return None
    found: dict[str, Any] = {"lists": len(mine)}
    for name, chosen in ways.items():
        times = [(h.list.library_s, h.measured[chosen(h)]) for h in mine]
        speeds = [theirs / stats.geomean(ours) for theirs, ours in times if len(ours)]
        found[name] = stats.geomean(speeds) if speeds else None
    return found


def tile_kinds(held: Sequence[Held]) -> dict[str, np.ndarray]:
    """Return predicted / measured by kind of tile: its size, its stages, its programs an SM."""
    ratios = np.concatenate([each.ratios for each in held])
    tiles = [tile for each in held for tile in each.list.tiles]
    area = np.array([tile.get("BLOCK_M", 1) * tile.get("BLOCK_N", 1) for tile in tiles])
    stages = np.array([tile.get("num_stages", 1) for tile in tiles])
    per_sm = np.concatenate([each.per_sm for each in held])
    kinds = {
        "tiles under 4,096 elements": area < 4096,
        "tiles of 4,096 and more": area >= 4096,
        "one stage or two": stages <= 2,
        "three stages and more": stages > 2,
        "at most one program an SM": per_sm <= 1,
        "one to eight programs an SM": (per_sm > 1) & (per_sm <= 8),
        "more than eight": per_sm > 8,
    }
    return {name: ratios[which] for name, which in kinds.items() if which.any()}


def summary(held: Sequence[Held]) -> dict[str, Any]:
    """Return everything, by GPU: of all its lists, by time of the best tile, by kind of tile."""
    found: dict[str, Any] = {}
    for label, mine in by_label(held).items():
        fixed = fixed_tile(mine)
        regimes = {name: [h for h in mine if h.regime == name] for name, _ in REGIMES}
        found[label] = {
            "fixed_tile": fixed,
            "all": about(mine, fixed),
            "by_time": {name: about(some, fixed) for name, some in regimes.items() if some},
            "by_tile": {name: level(ratios) for name, ratios in tile_kinds(mine).items()},
            "over_library": library(mine, fixed),
        }
    return found


def about(held: Sequence[Held], fixed: str | None) -> dict[str, Any]:
    """Return the level and the order of some lists."""
    return order(held, fixed) | level(np.concatenate([each.ratios for each in held]))


def by_label(held: Sequence[Held]) -> dict[str, list[Held]]:
    """Return the lists of each GPU, in the order in which they come."""
    found: dict[str, list[Held]] = {}
    for each in held:
        found.setdefault(each.list.label, []).append(each)
    return found


def rounded(value: Any, digits: int = 3) -> Any:
    """Return a summary with numbers of so many digits behind the point, as it is committed."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    return round(float(value), digits) if isinstance(value, float | np.floating) else value

"""Tables and figures of how well the prediction agrees with measurements (perf/rows/agreement.py).

Figures are drawn as those of figures.py are: within `figures.style`, for light and dark pages.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tilelab.perf.report import figures, plot
from tilelab.perf.report.figures import DARK, LIGHT, Theme
from tilelab.perf.rows import ranking, results
from tilelab.perf.rows.agreement import (
    NEAR,
    Held,
    Regret,
    by_label,
    fixed_tile,
    level,
    regrets,
)

LEVEL_COLUMNS = ("tiles", "median", "p10", "p90", "in 20%")
COLUMNS = (
    "lists", *LEVEL_COLUMNS, "rank", "≤5%", "≤10%", "≤25%", "regret", "call", "fixed", "random",
)  # fmt: skip
MEANING = """\
tiles, median, p10, p90, in 20%: predicted / measured time of each tile, and the share within 20%
rank: Spearman's correlation of predicted and measured times in a list, the median of the lists
≤5%, ≤10%, ≤25%: the share of lists in which the predicted tile takes so much longer than the best
regret: how much longer on average; call: the tile that a call takes, in the lists that have it
fixed: the one best tile for all lists; random: any tile"""


# -- tables ----------------------------------------------------------------------------------------


def text(found: dict[str, Any]) -> str:
    """Return a summary as text: a table by GPU and time, one by kind of tile, the library."""
    lines = [("", *COLUMNS)]
    for label, about in found.items():
        lines.append((label, *_cells(about["all"])))
        lines += [(f"  {name}", *_cells(part)) for name, part in about["by_time"].items()]
    kinds = [("predicted / measured", *LEVEL_COLUMNS)]
    for label, about in found.items():
        kinds.append((label, *_level(about["all"])))
        kinds += [(f"  {name}", *_level(part)) for name, part in about["by_tile"].items()]
    parts = [aligned(lines), MEANING, aligned(kinds), *map(_library, found, found.values())]
    return "\n\n".join(filter(None, parts))


def _level(about: dict[str, Any]) -> tuple[str, ...]:
    ratios = (f"{about[name]:.2f}" for name in ("median", "p10", "p90"))
    return f"{about['tiles']:,}", *ratios, f"{about['within_20']:.0%}"


def _cells(about: dict[str, Any]) -> tuple[str, ...]:
    rank, model = about["rank_correlation"], about["regret_model"]
    means = (about[f"regret_{name}"] for name in ("model", "call", "fixed", "random"))
    return (
        str(about["lists"]), *_level(about), "–" if rank is None else f"{rank:.2f}",
        *(f"{model[name]:.0%}" for name in ("within_5", "within_10", "within_25")),
        *("–" if regret is None else f"{regret['mean']:.1%}" for regret in means),
    )  # fmt: skip


def _library(label: str, about: dict[str, Any]) -> str:
    speeds, fixed = about["over_library"], about["fixed_tile"]
    if speeds is None:
        return ""
    words = [f"the predicted tile {speeds['model']:.2f}x"]
    if speeds["call"] is not None:
        words.append(f"the tile of a call {speeds['call']:.2f}x")
    if speeds["fixed"] is not None:
        words.append(f"the fixed tile ({fixed}) {speeds['fixed']:.2f}x")
    words.append(f"the best tile {speeds['best']:.2f}x")
    words = ", ".join(words)
    return f"{label}, speed over the vendor's library in {speeds['lists']} lists: {words}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


# -- figures ---------------------------------------------------------------------------------------


TIMES = ("measured", "predicted")  # of a list: across, and up


def scatter(held: Sequence[Held], note: str, theme: Theme = LIGHT) -> Figure:
    """Predicted over measured time of every tile, a panel for each GPU."""
    groups = by_label(held)
    ratios = np.concatenate([each.ratios for each in held])
    title = f"Predicted against measured: {level(ratios)['within_20']:.0%} of "
    title += f"{len(ratios):,} tiles within {NEAR:.0%}"
    figure, axes = _panels(groups, theme, title, f"The band is ±{NEAR:.0%}. {note}")
    times = np.concatenate([getattr(each, name) for each in held for name in TIMES])
    ends = np.array([times.min() / 1.4, times.max() * 1.4])
    for ax, (label, mine) in zip(axes, groups.items(), strict=True):
        about = level(np.concatenate([each.ratios for each in mine]))
        ax.fill_between(ends, (1 - NEAR) * ends, (1 + NEAR) * ends, color=theme.grey, alpha=0.25,
                        linewidth=0)  # fmt: skip
        ax.plot(ends, ends, color=theme.ink, linewidth=1)
        every = [np.concatenate([getattr(each, name) for each in mine]) for name in TIMES]
        best = np.concatenate([each.regrets == 0 for each in mine])
        style = {"linestyle": "none", "rasterized": True}
        ax.plot(*every, marker="o", markersize=2.4, color=theme.series[0], alpha=0.5,
                markeredgewidth=0, label="a tile", **style)  # fmt: skip
        ax.plot(*(times[best] for times in every), marker="s", markersize=4.5,
                color=theme.series[1], markeredgewidth=0.5, markeredgecolor=theme.background,
                label="the fastest tile of a list", **style)  # fmt: skip
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=TIMES[0])
        words = f"median ratio {about['median']:.2f}, {about['within_20']:.0%} in the band"
        ax.set_title(f"{label}: {words}", fontsize=9)
        ax.set_box_aspect(1)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda t, _: ranking.time_text(t)))
            axis.set_minor_locator(NullLocator())
        ax.grid()
    for ax in axes[::2]:
        ax.set_ylabel(TIMES[1])
    figures.legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


CURVES = {  # name of the way to choose: words, index of the colour, and line
    "model": ("the predicted tile", 0, "-"),
    "call": ("the tile that a call takes, where it was measured", 2, (0, (3, 1))),
    "fixed": ("the one best tile for all", 4, (0, (5, 2))),
    "random": ("a random tile", 6, (0, (1, 1.5))),
}
MOST = 0.5  # of the regret, where the axis ends


def curves(held: Sequence[Held], note: str, theme: Theme = LIGHT) -> Figure:
    """In how many lists the choice of a tile costs at most so much; a panel for each GPU."""
    groups = by_label(held)
    figure, axes = _panels(
        groups, theme, "What the choice of a tile costs",
        f"Regret: time of the chosen tile / time of the list's fastest tile - 1. {note}",
    )  # fmt: skip
    for ax, (label, mine) in zip(axes, groups.items(), strict=True):
        fixed = fixed_tile(mine)
        for name, regret in regrets(mine, fixed).items():
            if regret is not None:
                words, colour, line = CURVES[name]
                _step(ax, regret, color=theme.series[colour], linestyle=line, label=words,
                      linewidth=2.4 if name == "model" else 1.8)  # fmt: skip
        words = f"; the one best tile: {fixed}" if fixed else ""
        ax.set_title(f"{label}, {len(mine)} lists{words}", fontsize=9)
        ax.set(xlim=(0, 100 * MOST), ylim=(0, 102), xlabel="regret, at most (%)")
        ax.grid()
    for ax in axes[::2]:
        ax.set_ylabel("lists (%)")
    figures.legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


def _step(ax: Axes, regret: Regret, **style: Any) -> list[Line2D]:
    order = np.argsort(regret.values)
    shares = np.cumsum(regret.weights[order]) / regret.weights.sum()
    values = np.append(regret.values[order], max(MOST, regret.values.max()))
    return ax.step(100 * values, 100 * np.append(shares, 1), where="post", **style)


def _panels(
    groups: dict[str, list[Held]], theme: Theme, title: str, note: str
) -> tuple[Figure, np.ndarray]:
    across = 1 if len(groups) == 1 else 2
    down = -(-len(groups) // across)
    figure, axes = figures.blank(
        theme, title, 1.2 + (5.0 if across == 1 else 4.1) * down, note, nrows=down, ncols=across
    )
    for ax in axes.flat[len(groups) :]:
        ax.remove()
    return figure, axes.flat[: len(groups)]


DRAWN = {"predicted-against-measured": scatter, "regret": curves}


def save(held: Sequence[Held], note: str, folder: Path) -> list[Path]:
    """Write the figures, whole, for light and for dark pages."""
    paths = []
    for name, draw in DRAWN.items():
        for theme in (LIGHT, DARK):
            buffer = io.BytesIO()
            with figures.style(theme):
                draw(held, note, theme).savefig(buffer, format="png", dpi=plot.DPI)
            paths.append(folder / f"{name}-{theme.name}.png")
            results.write_whole(paths[-1], plot.smaller(buffer))
    return paths

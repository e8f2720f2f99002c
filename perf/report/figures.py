"""The figures: functions of workloads that return a matplotlib Figure, to draw within `style`.

Every figure says on what GPU, when and at which commit its numbers were made, and says so if they
are predicted. The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color) and, for
heat, viridis: colour-blind readers can tell them apart. A shape or a number repeats what a colour
says. Figures are 9 inches wide: 900 pixels in a README, where their smallest letters are 9 pixels
high.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tilelab.perf.report import diagnosis
from tilelab.perf.rows import stats
from tilelab.perf.rows.ranking import (
    NAMES,
    Row,
    Workload,
    best_tile,
    block_names,
    cut,
    dtype_text,
    has_result,
    known_gpu,
    number_text,
    seconds,
    speed,
    speedups,
    tile_text,
    unit,
)
from tilelab.perf.work import gpus
from tilelab.perf.work.search_space import LOWER_RUNGS

AGREEMENT = Path(__file__).parents[1] / "results" / "public" / "summary.json"
WIDTH, HEAD = 9.0, 0.68  # inches; the head is the title and the legend
MARKER = {"tilelab": "o", "torch": "s", "compile": "D", "inductor": "^", "graph": "v"}
MARKERS = "osD^vP*Xph<>"
HEAT = colormaps["viridis"]


class Theme(NamedTuple):
    """Colours of the page: its background, text, secondary text, lines, and of the series."""

    name: str
    background: str
    ink: str
    grey: str
    grid: str
    series: tuple[str, ...]

    @property
    def good(self) -> str:
        """Of tilelab, and of what went well."""
        return self.series[0]

    @property
    def bad(self) -> str:
        """Of what went wrong."""
        return self.series[1]


LIGHT = Theme(
    "light", "#ffffff", "#222222", "#666666", "#e4e4e4",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e8e8e8", "#a6a6a6", "#30363d",
    ("#56B4E9", "#F0803C", "#00BE8C", "#CC79A7", "#E69F00", "#3C8FC8", "#999999"),
)  # fmt: skip


def style(theme: Theme) -> AbstractContextManager[None]:
    """A context in which matplotlib draws, and saves, in a theme."""
    settings = {
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "hatch.linewidth": 0.8,
        "text.parse_math": False,  # a "$" in a name is a "$"
        "svg.fonttype": "none",
        "svg.hashsalt": "tilelab",
    }
    inks = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    greys = ("axes.edgecolor", "xtick.color", "ytick.color")
    pages = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
    for names, colour in ((inks, theme.ink), (greys, theme.grey), (pages, theme.background)):
        settings |= dict.fromkeys(names, colour)
    return rc_context(settings)


def frame(
    shown: Sequence[Workload],
    theme: Theme,
    title: str,
    height: float,
    note: str = "",
    head: float = HEAD,
    **subplots,
) -> tuple[Figure, np.ndarray]:
    """A figure with its title above and its provenance below, and its axes as a 2-d array.

    There is room for a legend of one line between title and axes: see `legend`.
    """
    warning = "" if all(w.measured for w in shown) else "predicted, not measured"
    text = "\n".join(filter(None, (note, provenance(shown), how_known(shown))))
    return blank(theme, title, height, text, warning, head, **subplots)


def blank(
    theme: Theme, title: str, height: float, note: str, warning: str = "", head: float = HEAD,
    **subplots,
) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """What `frame` is, of anything: with a note below, and maybe a warning beside the title."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, rect=(0, 0, 1, 1 - head / height))
    place = {"va": "top", "transform": figure.dpi_scale_trans}
    top = height - 0.12
    title = cut(title, 56 if warning else 80)
    figure.text(0.1, top, title, ha="left", fontsize=12.5, weight="bold", **place)
    if warning:
        words = {"fontsize": 10.5, "weight": "bold", "color": theme.bad}
        figure.text(WIDTH - 0.1, top, warning, ha="right", **words, **place)
    figure.supxlabel(note, x=0.012, ha="left", fontsize=7.5, color=theme.grey)
    return figure, figure.subplots(squeeze=False, **subplots)


def legend(figure: Figure, keys: Sequence[Artist], ncols: int = 7) -> None:
    """A legend of one line below the title."""
    figure.legend(
        handles=keys, loc="upper left", ncols=ncols, borderaxespad=0, borderpad=0,
        bbox_to_anchor=(0.1, figure.get_figheight() - 0.43),
        bbox_transform=figure.dpi_scale_trans, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip


def provenance(shown: Sequence[Workload]) -> str:
    """On what, of what, when and from which commit the numbers of a figure are."""
    rows = [row for w in shown for row in (*w.tiles, *w.peers)]
    days = sorted({row["time"][:10] for row in rows if row.get("time")})
    commits = sorted({row["commit"] for row in rows if row.get("commit")})
    parts = [
        _some({w.gpu for w in shown}),
        _some({dtype_text(w.dtype, w.precision) for w in shown}),
        _some({f"{w.op} {w.mode}" for w in shown}),
        days[0] + (f" to {days[-1]}" if days[-1] != days[0] else "") if days else "",
        f"commit {_some(commits, most=2)}" if commits else "",
        "hot cache" if any(w.cache == "hot" for w in shown) else "",
    ]
    return " · ".join(filter(None, parts))


def how_known(shown: Sequence[Workload]) -> str:
    """Of predictions: how far the model agrees with others' measurements, and of what kernels."""
    rows = [t for w in shown for t in w.tiles if t.get("known") and not t.get("median_s")]
    if not rows or not AGREEMENT.exists():
        return ""
    kinds = {row["known"] for row in rows}
    cards = [card["all"] for card in json.loads(AGREEMENT.read_text()).values()]
    tiles = sum(card["tiles"] for card in cards)
    near = sum(card["tiles"] * card["within_20"] for card in cards) / tiles
    return (
        f"predicted by a model that is within 20% of others' measurements for {near:.0%} of their "
        f"tiles: docs/prediction.md\nhow that is known of these kernels: {_some(kinds)}"
    )


def _some(texts: Iterable[str], most: int = 4) -> str:
    texts = [cut(text, 48) for text in sorted(texts)]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if texts[most:] else "")


def _about(shown: Sequence[Workload]) -> str:
    """The head of a title: operator, mode and dtype, and the shapes' family if they have one."""
    families = {w.family for w in shown}
    family = families.pop() if len(families) == 1 else ""
    first = shown[0]
    parts = f"{first.op} {first.mode}", family, dtype_text(first.dtype, first.precision)
    return ", ".join(filter(None, parts))


def labels(shown: Sequence[Workload]) -> list[str]:
    """Short names of one operator's workloads, different from each other if their shapes are."""
    one_family = len({w.family for w in shown}) == 1
    varying = _varying(shown)
    found = []
    for w in shown:
        text = w.label if one_family else w.name
        if not w.family and "=" in w.name and varying:
            text = " ".join(f"{k}={v}" for k, v in w.shape.items() if k in varying)
        found.append(cut(text, 34))
    return found


def _varying(shown: Sequence[Workload]) -> list[str]:
    """The sizes in which workloads differ."""
    keys = dict.fromkeys(key for w in shown for key in w.shape)
    return [key for key in keys if len({w.shape.get(key) for w in shown}) > 1]


def _log_ticks(ax: Axes) -> None:
    """Plain numbers on both logarithmic axes, also where they span less than a decade."""
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        span = math.log10(high / low)
        steps = (1, 2, 5) if span > 0.9 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10.0**e for e in decades for step in (steps if span < 2.5 else (1,))]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.12g}"))
        axis.set_minor_locator(NullLocator())


def _key(marker: str, colour: str, label: str) -> Line2D:
    """A symbol in a legend."""
    return Line2D([], [], marker=marker, color=colour, linestyle="none", markersize=7,
                  markeredgewidth=0.5, label=label)  # fmt: skip


# -- heat-map ------------------------------------------------------------------------------------

FAILED, PRUNED, UNTRIED = "wrong or error", "pruned, not timed", "not tried"
SHORT = {  # a code of diagnosis.py, as a cell has room for it
    "spills": "spills", "does not fit": "does not fit", "no tensor cores": "no tensor\ncores",
    "wrong": "wrong", "error": "error", "serialised": "serialised",
}  # fmt: skip
DETAILS = (  # of a cell, by line: field of its row, and how it is written
    (("registers", "{} reg".format), ("spills", "{} B spill".format)),
    (("occupancy", "{:.0%} occ".format), ("waves", lambda waves: f"{_short(waves)} w")),
)


def heatmap(shown: list[Workload], theme: Theme = LIGHT) -> Figure:
    """Speed over the first two block sizes, best over the rest; a panel for each workload."""
    grids = [_grid(w) for w in shown]
    columns = 1 if len(shown) == 1 or any(len(grid[1]) > 4 for grid in grids) else 2
    tall = [max(len(grid[0]) for grid in grids[i : i + columns])
            for i in range(0, len(grids), columns)]  # fmt: skip
    figure, axes = frame(
        shown, theme, f"{_about(shown)}: {unit(shown[0].op)} by tile",
        1.35 + sum(0.62 * n + 0.75 for n in tall),
        "In each cell, of its fastest tile: speed; registers and spilled bytes a thread; "
        "occupancy and waves (w).",
        nrows=len(tall), ncols=columns, gridspec_kw={"height_ratios": [n + 0.9 for n in tall]},
    )  # fmt: skip
    for ax, w, text, grid in zip(axes.flat, shown, labels(shown), grids, strict=False):
        _panel(ax, w, text, grid, theme)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    keys = [
        Patch(facecolor=HEAT(1.0), edgecolor=theme.good, linewidth=2.2, label="the winner"),
        *(Patch(facecolor=_heat(share), label=f"{share:.0%} of it") for share in (0.75, 0.5)),
        *(Patch(**_hatching(state, theme), label=state) for state in (FAILED, PRUNED, UNTRIED)),
    ]
    legend(figure, keys)
    return figure


def is_wide(shown: Iterable[Workload]) -> bool:
    """Heat-maps of these take the whole width: there are more than four columns."""
    return any(len(_grid(w)[1]) > 4 for w in shown)


def _heat(share: float) -> tuple:
    """The colour of a share of the best speed; a quarter and less are one colour."""
    return HEAT(max(0.0, min(1.0, (share - 0.25) / 0.75)))


def _hatching(state: str, theme: Theme) -> dict:
    """How a cell without a time is drawn."""
    hatch = {FAILED: "xxxx", PRUNED: "////", UNTRIED: "--"}[state]
    edge = theme.bad if state == FAILED else theme.grey
    return {"facecolor": theme.background, "edgecolor": edge, "hatch": hatch, "linewidth": 0.6}


def _grid(w: Workload) -> tuple[list, list, list[str], dict[tuple, list[Row]]]:
    """Values of the two axes, their names, and the tiles in each cell. One axis is one line."""
    tiles = [t for t in w.tiles if t.get("tile")]
    names = block_names(tiles[0]["tile"])[:2]
    names = [None, *names] if len(names) == 1 else names
    cells: dict[tuple, list[Row]] = {}
    for row in tiles:
        cells.setdefault(tuple(row["tile"].get(name) for name in names), []).append(row)
    down, across = (sorted({cell[i] for cell in cells}, key=lambda v: v or 0) for i in (0, 1))
    return down, across, names, cells


def _panel(ax: Axes, w: Workload, title: str, grid: tuple, theme: Theme) -> None:
    down, across, (y_name, x_name), cells = grid
    best = w.best
    for y, block_y in enumerate(down):
        for x, block_x in enumerate(across):
            _cell(ax, x, y, cells.get((block_y, block_x), []), best, theme)
    best_text = tile_text(best["tile"]) if best else "no tile has a time"
    ax.set_title(cut(f"{title}: {best_text}", 46), fontsize=9, pad=5)
    ax.set(xlim=(-0.5, len(across) - 0.5), ylim=(-0.5, len(down) - 0.5), xlabel=x_name)
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down if y_name else [""])
    ax.set_ylabel(y_name or "")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _cell(ax: Axes, x: int, y: int, tiles: list[Row], best: Row | None, theme: Theme) -> None:
    """One pair of block sizes: its best tile, or why there is none."""
    box = {"xy": (x - 0.48, y - 0.47), "width": 0.96, "height": 0.94}
    timed = best_tile(tiles)
    if timed is None:
        state, text = _failure(tiles, best)
        ax.add_patch(Rectangle(**box, **_hatching(state, theme)))
        words = {"facecolor": theme.background, "edgecolor": "none", "pad": 2.0}
        if text:
            ax.text(x, y, text, ha="center", va="center", fontsize=7.5, linespacing=1.2, bbox=words)
        return
    colour = _heat(speed(timed) / speed(best))
    ax.add_patch(Rectangle(**box, facecolor=colour, edgecolor="none"))
    if timed is best:
        ax.add_patch(Rectangle(**box, fill=False, edgecolor=theme.good, linewidth=3, zorder=3))
    dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.5
    style = {"ha": "center", "color": "#ffffff" if dark else "#111111"}
    details = [
        ", ".join(write(timed[name]) for name, write in line if timed.get(name) is not None)
        for line in DETAILS
    ]
    ax.text(
        x, y + 0.1, number_text(speed(timed)), va="bottom", fontsize=10.5, weight="bold", **style
    )
    ax.text(x, y + 0.04, "\n".join(details), va="top", fontsize=7, linespacing=1.25, **style)


def _short(waves: float) -> str:
    return number_text(waves) if waves > 9.995 else f"{waves:.2f}"


def _failure(tiles: list[Row], best: Row | None) -> tuple[str, str]:
    """The state of a cell in which no tile has a time, and what to write into it."""
    order = ("wrong", "error", "pruned")
    failed = [row for row in tiles if row["status"] in order]
    if not failed:
        return UNTRIED, ""
    worst = min(failed, key=lambda row: order.index(row["status"]))
    code, _ = diagnosis.explain_loss(worst, best)
    text = SHORT.get(code, "pruned")
    if code == "spills":
        text += f"\n{min(row['spills'] for row in tiles if row.get('spills')):,} B"
    return PRUNED if worst["status"] == "pruned" else FAILED, text


# -- size curves ---------------------------------------------------------------------------------


def curves(shown: list[Workload], theme: Theme = LIGHT) -> Figure:
    """Speed of tilelab's best tile and of every peer over sizes, or over layers in their order."""
    sizes = numeric_sizes(shown)
    names = labels(shown)
    long = not sizes and max(map(len, names)) > 5
    figure, ((ax,),) = frame(
        shown, theme, f"{_about(shown)}: speed by {'size' if sizes else 'shape'}",
        4.7 if long else 4.2,
        "tilelab: its best tile. Bands and bars: quartiles of the rounds. Ceiling: peak or "
        "bandwidth, whichever is lower.",
    )  # fmt: skip
    if sizes:
        shown = [w for _, w in sorted(zip(sizes[1], shown, strict=True), key=lambda p: p[0])]
        xs = np.array(sorted(sizes[1]), dtype=float)
    else:
        xs = np.arange(len(shown), dtype=float)
    _ceilings(ax, xs, shown, theme, as_line=bool(sizes))
    impls = [i for i in NAMES if any(_result(w, i) for w in shown)]
    for at, impl in enumerate(reversed(impls)):
        shift = 0.0 if sizes or len(impls) == 1 else 0.11 * ((len(impls) - 1) / 2 - at)
        _series(ax, xs + shift, shown, impl, theme, as_line=bool(sizes))
    ax.set_ylim(bottom=0)
    ax.set_ylabel(unit(shown[0].op))
    ax.grid(axis="y")
    if sizes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(xs))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(sizes[0])
    else:
        ax.set_xticks(xs, names, rotation=40 if long else 0, ha="right" if long else "center")
        if long:
            for text in ax.get_xticklabels():
                text.set_rotation_mode("anchor")
        ax.set_xlim(-0.6, len(shown) - 0.4)
    legend(figure, ax.get_legend_handles_labels()[0][::-1])
    return figure


def numeric_sizes(shown: Sequence[Workload]) -> tuple[str, list[int]] | None:
    """The one size that varies, as the label of an axis and its values; None if several do."""
    varying = _varying(shown)
    if len(shown) < 3 or not varying:
        return None
    if not all(len({w.shape.get(key) for key in varying}) == 1 for w in shown):
        return None
    return " = ".join(varying), [w.shape[varying[0]] for w in shown]


def _result(w: Workload, impl: str) -> Row | None:
    return w.best if impl == "tilelab" else best_tile(p for p in w.peers if p["impl"] == impl)


def _series(
    ax: Axes, xs: np.ndarray, shown: list[Workload], impl: str, theme: Theme, as_line: bool
) -> None:
    """One implementation: a line with a band over sizes, points with bars over layers."""
    found = [(x, row) for x, w in zip(xs, shown, strict=True) if (row := _result(w, impl))]
    xs, rows = [x for x, _ in found], [row for _, row in found]
    middle = [speed(row) for row in rows]
    low = [speed(row, row.get("q75_s")) for row in rows]
    high = [speed(row, row.get("q25_s")) for row in rows]
    colour, mine = theme.series[list(NAMES).index(impl)], impl == "tilelab"
    style = {"color": colour, "marker": MARKER[impl], "markersize": 7 if mine else 5.5}
    if as_line:
        ax.fill_between(xs, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(xs, middle, linewidth=2.4 if mine else 1.5, label=NAMES[impl], **style)
    else:
        ax.vlines(xs, low, high, color=colour, linewidth=2)
        ax.plot(xs, middle, linestyle="none", label=NAMES[impl], **style)


def limits(w: Workload) -> tuple[float, float] | None:
    """The GPU's peak in FLOP/s and its bandwidth in bytes/s; None for an unknown GPU."""
    gpu = known_gpu(w.gpu)
    peak = gpu and gpu.peak(gpus.kind(w.dtype, w.precision))
    return (peak, gpu.bandwidth) if peak else None


def ceiling(w: Workload) -> float | None:
    """The speed that no implementation can pass: peak or bandwidth; None for an unknown GPU."""
    row = next(iter((*w.tiles, *w.peers)))
    if not (known := limits(w)) or not row.get("bytes") or not row.get("flops"):
        return None
    return speed(row, max(row["flops"] / known[0], row["bytes"] / known[1]))


def _ceilings(ax: Axes, xs: np.ndarray, shown: list[Workload], theme: Theme, as_line: bool) -> None:
    found = [(x, c) for x, w in zip(xs, shown, strict=True) if (c := ceiling(w))]
    if not found:
        return
    x, y = (np.array(values) for values in zip(*found, strict=True))
    style = {"color": theme.grey, "linewidth": 1.3, "label": "ceiling"}
    if as_line:
        ax.plot(x, y, linestyle=(0, (5, 3)), **style)
    else:
        ax.hlines(y, x - 0.38, x + 0.38, **style)


# -- roofline ------------------------------------------------------------------------------------


def roofline(shown: list[Workload], theme: Theme = LIGHT) -> Figure:
    """Speed over arithmetic intensity, under the GPU's roofs; peers hollow, joined to tilelab's."""
    kinds = list(dict.fromkeys((w.op, w.mode) for w in shown))
    columns = 4  # of the legend, whose words are as long as conv2d_relu_pool wgrad
    more = 0.2 * (math.ceil(len(kinds) / columns) - 1)
    figure, ((ax,),) = frame(
        shown, theme, f"Roofline: {shown[0].gpu}, {dtype_text(shown[0].dtype, shown[0].precision)}",
        4.9 + more,
        "Intensity: FLOPs over the bytes that must be moved at least. Filled: tilelab's best tile. "
        "Hollow: the fastest peer.",
        head=HEAD + more,
    )  # fmt: skip
    for w in shown:
        at = kinds.index((w.op, w.mode))
        style = {"color": theme.series[at % 7], "marker": MARKERS[at % 12], "linestyle": "none"}
        x, y = w.best["flops"] / w.best["bytes"], w.best["flops"] / seconds(w.best) / 1e12
        if peer := w.best_peer:
            other = peer["flops"] / seconds(peer) / 1e12
            ax.plot([x, x], [y, other], color=style["color"], linewidth=1, alpha=0.7)
            ax.plot([x], [other], **style | {"markerfacecolor": theme.background}, markersize=6)
        ax.plot([x], [y], **style, markersize=6.5, markeredgecolor=theme.background,
                markeredgewidth=0.5)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s")
    _roofs(ax, shown[0], theme)
    _log_ticks(ax)
    ax.grid(which="major")
    keys = [
        _key(MARKERS[i % 12], theme.series[i % 7], f"{op} {mode}")
        for i, (op, mode) in enumerate(kinds)
    ]
    legend(figure, keys, columns)
    return figure


def _roofs(ax: Axes, w: Workload, theme: Theme) -> None:
    if not (known := limits(w)):
        return
    peak, bandwidth = known
    (left, right), bottom = ax.get_xlim(), ax.get_ylim()[0]
    ridge = peak / bandwidth
    left, right = min(left, ridge / 8), max(right, ridge * 8)
    xs = np.array([left, ridge, right])
    roof = np.minimum(xs * bandwidth, peak) / 1e12
    ax.plot(xs, roof, color=theme.grey, linewidth=1.6, zorder=1)
    ax.set(xlim=(left, right), ylim=(min(bottom, roof[0]) / 1.5, 2.2 * peak / 1e12))
    kind = gpus.kind(w.dtype, w.precision)
    words = {"textcoords": "offset points", "ha": "right", "color": theme.grey, "fontsize": 9}
    ax.annotate(f"{peak / 1e12:,.0f} TFLOP/s ({kind})", (right, peak / 1e12), (-4, 4), **words)
    ax.annotate(f"{bandwidth / 1e12:.3g} TB/s", (ridge, peak / 1e12), (-6, 4), **words)


# -- predicted against measured ------------------------------------------------------------------


def predicted_rows(shown: Iterable[Workload]) -> list[Row]:
    """The tiles that have both a measured and a predicted time."""
    return [
        t
        for w in shown
        for t in w.tiles
        if has_result(t) and t.get("median_s") and t.get("predicted_s")
    ]


def prediction_error(rows: Sequence[Row]) -> float:
    """The median of |predicted - measured| / measured."""
    return float(np.median([abs(row["predicted_s"] / row["median_s"] - 1) for row in rows]))


def predicted(shown: list[Workload], theme: Theme = LIGHT) -> Figure:
    """Predicted time over measured time of every tile that has both."""
    rows = predicted_rows(shown)
    figure, ((ax,),) = frame(
        shown, theme,
        f"Predicted against measured: median error {prediction_error(rows):.0%} of "
        f"{len(rows):,} tiles", 5.0,
        "Error: |predicted - measured| / measured. The band is ±25%. Below the diagonal the tile "
        "took longer than predicted.", head=0.42,
    )  # fmt: skip
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['op']} {row['mode']}", []).append(row)
    for i, (name, members) in enumerate(groups.items()):
        ax.plot(
            [1e6 * r["median_s"] for r in members], [1e6 * r["predicted_s"] for r in members],
            color=theme.series[i % 7], marker=MARKERS[i % 12], markersize=4.5, linestyle="none",
            alpha=0.6, markeredgewidth=0, rasterized=True,
            label=f"{name} ({prediction_error(members):.0%})",
        )  # fmt: skip
    times = [1e6 * row[field] for row in rows for field in ("median_s", "predicted_s")]
    ends = np.array([min(times) / 1.4, max(times) * 1.4])
    ax.plot(ends, ends, color=theme.ink, linewidth=1.2)
    ax.fill_between(ends, 0.75 * ends, 1.25 * ends, color=theme.grey, alpha=0.2, linewidth=0)
    ax.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured (µs)",
        ylabel="predicted (µs)",
    )  # fmt: skip
    _log_ticks(ax)
    ax.grid()
    columns = 1 if len(groups) <= 10 else 2
    ax.legend(loc="upper left", title="median error", title_fontsize=9, alignment="left",
              ncols=columns)  # fmt: skip
    for handle in ax.get_legend().legend_handles:
        handle.set_alpha(1)
    return figure


# -- forest --------------------------------------------------------------------------------------


def forest(shown: list[Workload], theme: Theme = LIGHT) -> Figure:
    """Speed-up over the fastest peer with its 95% interval, and the geometric mean of all."""
    found = speedups(shown)
    shown = [s.workload for s in found]
    figure, ((ax,),) = frame(
        shown, theme, f"{_about(shown)}: tilelab against the fastest peer",
        1.75 + 0.27 * (len(found) + 1),
        "Right: the speed-up, its 95% bootstrap interval over paired rounds, and the fastest "
        "peer. Hollow: not timed in the same rounds.",
    )  # fmt: skip
    colours = {"faster": theme.good, "slower": theme.bad}
    ax.axvline(1, color=theme.ink, linewidth=1.2)
    for y, s in enumerate(found):
        colour = colours.get(s.verdict, theme.grey)
        if s.low is not None:
            ax.plot([s.low, s.high], [y, y], "|-", color=colour, linewidth=2, markersize=8)
        hollow = {"markerfacecolor": theme.background} if s.low is None else {}
        ax.plot([s.ratio], [y], "o", color=colour, markersize=5.5, **hollow)
        bounds = f" [{s.low:.3f}, {s.high:.3f}]" if s.low is not None else ""
        _beside(ax, y, f"{s.ratio:.2f}x{bounds} {NAMES[s.peer]}")
    mean = stats.geomean([s.ratio for s in found])
    bottom = len(found) + 0.1
    ax.plot([mean], [bottom], "D", color=theme.ink, markersize=8)
    ax.axhline(len(found) - 0.5, color=theme.grid)
    _beside(ax, bottom, f"{mean:.2f}x", weight="bold")
    ax.set_yticks([*range(len(found)), bottom], [*labels(shown), "geometric mean"])
    ax.set(ylim=(bottom + 0.6, -0.6), xscale="log")
    _ratio_axis(ax, [v for s in found for v in (s.ratio, s.low or s.ratio, s.high or s.ratio)])
    ax.set_xlabel("speed-up: time of the fastest peer / time of tilelab (← slower   faster →)")
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    words = ((theme.good, "tilelab is faster"), (theme.bad, "slower"), (theme.grey, "a tie"))
    legend(figure, [_key("o", colour, label) for colour, label in words])
    return figure


def _beside(ax: Axes, y: float, text: str, **style) -> None:
    ax.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(8, 0), fontsize=8, va="center",
        textcoords="offset points", **style,
    )  # fmt: skip


def _ratio_axis(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of ratios around 1 with ticks that can be read."""
    low, high = min(0.95, *values) / 1.03, max(1.05, *values) * 1.03
    if high / low < 2.5:
        step = 0.05 if high / low < 1.4 else 0.1 if high / low < 1.8 else 0.2
        ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    else:
        ticks = [v for e in range(-3, 4) for v in np.array([1, 2, 5]) * 10.0**e if low < v < high]
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}x"))


# -- ladder --------------------------------------------------------------------------------------
# A rung is a kernel of a lesson. They are in the order in which it climbs, each with its name
# in the legend and which of the theme's colours. A tile with no "kernel" is of "pointer".
RUNGS = {
    "direct": ("direct, no tensor cores", 6),
    "flat": ("implicit GEMM", 4),
    "pointer": ("a step in one tap", 1),
    "tma": ("boxes by TMA", 0),
}
BAR = 0.2  # inches


def rungs(w: Workload) -> dict[str, Row]:
    """The fastest tile of each kernel that has a time."""
    tiles = {rung: [] for rung in RUNGS}
    for row in w.tiles:
        tiles.get((row["tile"] or {}).get("kernel", "pointer"), []).append(row)
    return {rung: best for rung, rows in tiles.items() if (best := best_tile(rows))}


def climbs(w: Workload) -> bool:
    """Whether it has a rung that only a ladder has, and another."""
    found = rungs(w)
    return len(found) > 1 and any(rung in found for rung in LOWER_RUNGS)


def ladder(shown: list[Workload], theme: Theme = LIGHT) -> Figure:
    """Speed of each kernel of a lesson, from naive to fast, beside the peak; a group a layer."""
    found = [rungs(w) for w in shown]
    used = [rung for rung in RUNGS if any(rung in f for f in found)]
    made = "measured" if all(w.measured for w in shown) else "compiled, predicted, not measured"
    height = 1.75 + BAR * (len(used) + 1) * len(shown)
    figure, ((ax,),) = frame(
        shown, theme, f"{_about(shown)}: from naive to fast", height,
        f"The fastest tile of each kernel: {made}. Dashed: the peak of the tensor cores.",
    )  # fmt: skip
    places = []
    for group, best in enumerate(found):
        first = group * (len(used) + 1)
        for at, rung in enumerate(used, start=first):
            if rung in best:
                value, (_, colour) = speed(best[rung]), RUNGS[rung]
                ax.barh(at, value, height=0.86, color=theme.series[colour])
                ax.annotate(number_text(value), (value, at), xytext=(4, 0), fontsize=8,
                            textcoords="offset points", va="center")  # fmt: skip
        places.append(first + (len(used) - 1) / 2)
    ax.set_yticks(places, labels(shown))
    end = max(speed(row) for best in found for row in best.values())
    if known := limits(shown[0]):
        end = known[0] / 1e12
        ax.axvline(end, color=theme.grey, linewidth=1.3, linestyle=(0, (5, 3)))
    ax.set(xlabel=unit(shown[0].op), xlim=(0, 1.06 * end))
    ax.set_ylim(len(shown) * (len(used) + 1) - 1.3, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    legend(figure, [Patch(facecolor=theme.series[RUNGS[r][1]], label=RUNGS[r][0]) for r in used])
    return figure


def ladder_text(shown: Iterable[Workload]) -> str:
    """What the figure shows, for those who do not see it."""
    each = []
    for w in shown:
        speeds = (f"{name} {number_text(speed(row))}" for name, row in rungs(w).items())
        each.append(f"{w.label} {', '.join(speeds)}")
    return "; ".join(each)

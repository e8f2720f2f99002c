"""The figures: functions of rows that return a matplotlib Figure, in a light or dark theme.

Every figure says on what GPU, when and at which commit its numbers were made, and those of
predicted numbers say that they are. Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color)
and, for heat, viridis, told apart by colour-blind readers too; what colour says, a shape or a
number says again. Figures are 9 inches wide: 900 pixels in a README, where their smallest letters
are 9 pixels high.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
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
    Row,
    Workload,
    block_names,
    dtype_text,
    known_gpu,
    number_text,
    paired,
    ran,
    rank,
    seconds,
    speed,
    tile_text,
    unit,
    workloads,
)
from tilelab.perf.work import gpus

WIDTH, HEAD = 9.0, 0.68  # inches; the head is the title and the legend
IMPL = {
    "tilelab": "tilelab",
    "torch": "PyTorch",
    "compile": "torch.compile",
    "inductor": "Inductor",
    "graph": "PyTorch, CUDA graph",
}
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

    def impl(self, name: str) -> str:
        """Of an implementation."""
        return self.series[list(IMPL).index(name)]


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
    return rc_context(_settings(theme))


def _settings(theme: Theme) -> dict:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.grey,
        "axes.facecolor": theme.background,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": theme.grey,
        "ytick.color": theme.grey,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "figure.dpi": 100,
        "hatch.linewidth": 0.8,
        "text.parse_math": False,  # a "$" in a name is a "$"
        "svg.fonttype": "none",
        "svg.hashsalt": "tilelab",
    }


def of_rows(function: Callable[[list[Workload], Theme], Figure]) -> Callable[..., Figure]:
    """Make a function of workloads and a theme one of rows, drawn in that theme."""

    @functools.wraps(function)
    def drawn(rows: Iterable[Row], theme: Theme = LIGHT) -> Figure:
        with style(theme):
            return function(workloads(rows), theme)

    return drawn


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
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, rect=(0, 0, 1, 1 - head / height))
    place = {"va": "top", "transform": figure.dpi_scale_trans}
    top = height - 0.12
    title = _cut(title, 80 if all(w.measured for w in shown) else 56)
    figure.text(0.1, top, title, ha="left", fontsize=12.5, weight="bold", **place)
    if not all(w.measured for w in shown):
        words = {"fontsize": 10.5, "weight": "bold", "color": theme.bad}
        figure.text(WIDTH - 0.1, top, "predicted, not measured", ha="right", **words, **place)
    text = "\n".join(filter(None, (note, provenance(shown))))
    figure.supxlabel(text, x=0.012, ha="left", fontsize=7.5, color=theme.grey)
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


def _some(texts: Iterable[str], most: int = 4) -> str:
    texts = [_cut(text, 48) for text in sorted(texts)]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if texts[most:] else "")


def _about(shown: Sequence[Workload]) -> str:
    """The head of a title: what all that is shown has in common."""
    ops = {f"{w.op} {w.mode}" for w in shown}
    families = {w.family for w in shown}
    parts = [*ops] if len(ops) == 1 else []
    parts += [f for f in families if f] if len(families) == 1 else []
    dtypes = {dtype_text(w.dtype, w.precision) for w in shown}
    return ", ".join([*parts, *dtypes] if len(dtypes) == 1 else parts)


def labels(shown: Sequence[Workload]) -> list[str]:
    """Short names of workloads, different from each other if their shapes are."""
    one_op = len({(w.op, w.mode) for w in shown}) == 1
    one_family = len({w.family for w in shown}) == 1
    varying = _varying(shown)
    found = []
    for w in shown:
        text = w.label if one_family else w.name
        if not w.family and "=" in w.name and varying:
            text = " ".join(f"{k}={v}" for k, v in w.shape.items() if k in varying)
        found.append(text if one_op else f"{w.op} {w.mode} {text}")
    return [_cut(text, 34) for text in found]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


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


def _key(marker: str, colour: str, label: str, size: float = 7, edge: float = 0.5) -> Line2D:
    """A symbol in a legend."""
    return Line2D([], [], marker=marker, color=colour, linestyle="none", markersize=size,
                  markeredgewidth=edge, label=label)  # fmt: skip


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.0f}%"


# -- heat-map ------------------------------------------------------------------------------------

FAILED, PRUNED, UNTRIED = "wrong or error", "pruned, not timed", "not tried"
SHORT = {
    "spills": "spills", "does not fit": "does not fit", "no tensor cores": "no tensor\ncores",
    "wrong": "wrong", "error": "error", "serialised": "serialised",
}  # fmt: skip


@of_rows
def heatmap(shown: list[Workload], theme: Theme) -> Figure:
    """Speed over the first two block sizes, best over the rest; a panel for each workload."""
    shown = [w for w in shown if any(t.get("tile") for t in w.tiles)]
    grids = [_grid(w) for w in shown]
    per_row = 1 if is_wide(shown) or len(shown) == 1 else 2
    tall = [
        max(len(rows) for rows, *_ in grids[i : i + per_row]) for i in range(0, len(grids), per_row)
    ]
    figure, axes = frame(
        shown, theme, f"{_about(shown)}: {unit(shown[0].op)} by tile",
        1.35 + sum(0.62 * n + 0.75 for n in tall),
        "In each cell, of its fastest tile: speed; registers and spilled bytes a thread; "
        "occupancy and waves (w).",
        nrows=len(tall), ncols=per_row, gridspec_kw={"height_ratios": [n + 0.9 for n in tall]},
    )  # fmt: skip
    for ax, w, text, grid in zip(axes.flat, shown, labels(shown), grids, strict=False):
        _panel(ax, w, text, grid, theme)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    keys = [
        Patch(facecolor=HEAT(1.0), edgecolor=theme.good, linewidth=2.2, label="the winner"),
        *(Patch(facecolor=_heat(share), label=f"{share:.0%} of it") for share in (0.75, 0.5)),
        *(_hatched(theme, kind, label=kind) for kind in (FAILED, PRUNED, UNTRIED)),
    ]
    legend(figure, keys)
    return figure


def is_wide(shown: Iterable[Workload]) -> bool:
    """Heat-maps of these take the whole width: there are more than four columns."""
    return any(len(_grid(w)[1]) > 4 for w in shown)


def _heat(share: float) -> tuple:
    """The colour of a share of the best speed; a quarter and less are one colour."""
    return HEAT(max(0.0, min(1.0, (share - 0.25) / 0.75)))


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
    ax.set_title(_cut(f"{title}: {best_text}", 46), fontsize=9, pad=5)
    ax.set(xlim=(-0.5, len(across) - 0.5), ylim=(-0.5, len(down) - 0.5), xlabel=x_name)
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down if y_name else [""])
    ax.set_ylabel(y_name or "")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _cell(ax: Axes, x: int, y: int, tiles: list[Row], best: Row | None, theme: Theme) -> None:
    """One pair of block sizes: its best tile, or why there is none."""
    box = {"xy": (x - 0.48, y - 0.47), "width": 0.96, "height": 0.94}
    timed = min(filter(ran, tiles), key=rank, default=None)
    if timed is None:
        kind = _kind(tiles)
        ax.add_patch(_hatched(theme, kind, **box))
        if kind != UNTRIED:
            _why_none(ax, x, y, tiles, best, theme)
        return
    colour = _heat(speed(timed) / speed(best))
    is_best = timed is best
    ax.add_patch(Rectangle(**box, facecolor=colour, edgecolor="none"))
    if is_best:
        ax.add_patch(Rectangle(**box, fill=False, edgecolor=theme.good, linewidth=3, zorder=3))
    dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.5
    style = {"ha": "center", "color": "#ffffff" if dark else "#111111"}
    value = number_text(speed(timed))
    ax.text(x, y + 0.1, value, va="bottom", fontsize=10.5, weight="bold", **style)
    ax.text(
        x, y + 0.04, "\n".join(_details(timed)), va="top", fontsize=7, linespacing=1.25, **style
    )


def _details(row: Row) -> list[str]:
    """Two short lines: registers and spills; occupancy and waves."""
    known = lambda field, form: form.format(row[field]) if row.get(field) is not None else ""  # noqa: E731
    lines = (
        (known("registers", "{} reg"), known("spills", "{} B spill")),
        (
            known("occupancy", "{:.0%} occ"),
            _waves(row),
        ),
    )
    return [", ".join(filter(None, line)) for line in lines]


def _waves(row: Row) -> str:
    waves = row.get("waves")
    return (
        "" if waves is None else f"{waves:.{2 if waves < 9.995 else 1 if waves < 99.95 else 0}f} w"
    )


def _kind(tiles: list[Row]) -> str:
    states = {row["status"] for row in tiles}
    if states & {"wrong", "error"}:
        return FAILED
    return PRUNED if "pruned" in states else UNTRIED


def _hatched(theme: Theme, kind: str, label: str | None = None, **box) -> Patch:
    hatch, edge = {
        FAILED: ("xxxx", theme.bad),
        PRUNED: ("////", theme.grey),
        UNTRIED: ("--", theme.grey),
    }[kind]
    style = {"facecolor": theme.background, "edgecolor": edge, "hatch": hatch, "linewidth": 0.6}
    return Rectangle(**box, **style) if box else Patch(**style, label=label)


def _why_none(ax: Axes, x: int, y: int, tiles: list[Row], best: Row | None, theme: Theme) -> None:
    order = ("wrong", "error", "pruned")
    worst = min((row for row in tiles if row["status"] in order),
                key=lambda row: order.index(row["status"]))  # fmt: skip
    code, _ = diagnosis.why(worst, best)
    text = SHORT.get(code, "pruned")
    if code == "spills":
        text += f"\n{min(row['spills'] for row in tiles if row.get('spills')):,} B"
    ax.text(
        x, y, text, ha="center", va="center", fontsize=7.5, linespacing=1.2,
        bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 2.0},
    )  # fmt: skip


# -- size curves ---------------------------------------------------------------------------------


@of_rows
def curves(shown: list[Workload], theme: Theme) -> Figure:
    """Speed of tilelab's best tile and of every peer over sizes, or over layers in their order."""
    shown = [w for w in shown if w.best or w.best_peer]
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
    impls = [i for i in IMPL if any(_result(w, i) for w in shown)]
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
    rows = [w.best] if impl == "tilelab" else [p for p in w.peers if p["impl"] == impl and ran(p)]
    return rows[0] if rows else None


def _series(
    ax: Axes, xs: np.ndarray, shown: list[Workload], impl: str, theme: Theme, as_line: bool
) -> None:
    """One implementation: a line with a band over sizes, points with bars over layers."""
    found = [(x, row) for x, w in zip(xs, shown, strict=True) if (row := _result(w, impl))]
    xs, rows = [x for x, _ in found], [row for _, row in found]
    middle = [speed(row) for row in rows]
    low = [speed(row, row.get("q75_s")) for row in rows]
    high = [speed(row, row.get("q25_s")) for row in rows]
    colour, mine = theme.impl(impl), impl == "tilelab"
    style = {"color": colour, "marker": MARKER[impl], "markersize": 7 if mine else 5.5}
    if as_line:
        ax.fill_between(xs, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(xs, middle, linewidth=2.4 if mine else 1.5, label=IMPL[impl], **style)
    else:
        ax.vlines(xs, low, high, color=colour, linewidth=2)
        ax.plot(xs, middle, linestyle="none", label=IMPL[impl], **style)


def ceiling(w: Workload) -> float | None:
    """The speed that no implementation can pass: peak or bandwidth; None for an unknown GPU."""
    row = next(iter((*w.tiles, *w.peers)))
    gpu = known_gpu(w.gpu)
    peak = gpu and gpu.peak(gpus.kind(w.dtype, w.precision))
    if not peak or not row.get("bytes") or not row.get("flops"):
        return None
    return speed(row, max(row["flops"] / peak, row["bytes"] / gpu.bandwidth))


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


@of_rows
def roofline(shown: list[Workload], theme: Theme) -> Figure:
    """Speed over arithmetic intensity, under the GPU's roofs; peers hollow, joined to tilelab's."""
    shown = [w for w in shown if w.best and w.best.get("bytes") and w.best.get("flops")]
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
    gpu = known_gpu(w.gpu)
    kind = gpus.kind(w.dtype, w.precision)
    peak = gpu and gpu.peak(kind)
    if not peak:
        return
    (left, right), bottom = ax.get_xlim(), ax.get_ylim()[0]
    ridge = peak / gpu.bandwidth
    left, right = min(left, ridge / 8), max(right, ridge * 8)
    xs = np.array([left, ridge, right])
    roof = np.minimum(xs * gpu.bandwidth, peak) / 1e12
    ax.plot(xs, roof, color=theme.grey, linewidth=1.6, zorder=1)
    ax.set(xlim=(left, right), ylim=(min(bottom, roof[0]) / 1.5, 2.2 * peak / 1e12))
    ax.annotate(
        f"{peak / 1e12:,.0f} TFLOP/s ({kind})", (right, peak / 1e12), xytext=(-4, 4),
        textcoords="offset points", ha="right", color=theme.grey, fontsize=9,
    )  # fmt: skip
    ax.annotate(
        f"{gpu.bandwidth / 1e12:.3g} TB/s", (ridge, peak / 1e12), xytext=(-6, 4),
        textcoords="offset points", ha="right", color=theme.grey, fontsize=9,
    )  # fmt: skip


# -- predicted against measured ------------------------------------------------------------------


def predicted_rows(shown: Iterable[Workload]) -> list[Row]:
    """The tiles that have both a measured and a predicted time."""
    return [
        t for w in shown for t in w.tiles if ran(t) and t.get("median_s") and t.get("predicted_s")
    ]


def prediction_error(rows: Sequence[Row]) -> float:
    """The median of |predicted - measured| / measured."""
    return float(np.median([abs(row["predicted_s"] / row["median_s"] - 1) for row in rows]))


@of_rows
def predicted(shown: list[Workload], theme: Theme) -> Figure:
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


# -- energy --------------------------------------------------------------------------------------


def energy_rows(shown: Iterable[Workload]) -> list[Row]:
    """The rows of which the energy was measured."""
    return [r for w in shown for r in (*w.tiles, *w.peers) if ran(r) and r.get("joules")]


@of_rows
def energy(shown: list[Workload], theme: Theme) -> Figure:
    """Work per joule over speed: tiles and peers, with lines of equal power."""
    rows = energy_rows(shown)
    product = unit(rows[0]["op"]) == "TFLOP/s"
    work = "TFLOP" if product else "GB"
    figure, ((ax,),) = frame(
        shown, theme, f"{_about(shown)}: energy against speed", 4.7,
        "Finalists and peers. Lines: equal power. A large symbol is tilelab's best tile of a "
        "workload.",
    )  # fmt: skip
    winners = {id(w.best) for w in shown}
    impls = [i for i in IMPL if any(row["impl"] == i for row in rows)]
    for row in sorted(rows, key=lambda row: id(row) in winners):
        mine, large = row["impl"] == "tilelab", id(row) in winners
        ax.plot(
            [speed(row)], [_per_joule(row)], marker=MARKER[row["impl"]], markeredgewidth=0.5,
            markersize=8.5 if large else 5.5, color=theme.impl(row["impl"]),
            alpha=0.45 if mine and not large else 1, markeredgecolor=theme.background,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=unit(rows[0]["op"]), ylabel=f"{work} per joule")
    ax.margins(0.12)
    watts = [row["joules"] / seconds(row) for row in rows]
    _power_lines(ax, theme, min(watts) / 2, max(watts) * 2)
    _log_ticks(ax)
    keys = [_key(MARKER[i], theme.impl(i), IMPL[i]) for i in impls]
    legend(figure, keys)
    return figure


def _per_joule(row: Row) -> float:
    """TFLOP or GB for a joule."""
    return speed(row) * seconds(row) / row["joules"]


def _power_lines(ax: Axes, theme: Theme, least: float, most: float) -> None:
    """Lines of equal power: at P watts, work per joule is speed / P."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for watts in (10, 20, 50, 100, 150, 200, 300, 400, 550, 700, 1000, 1400):
        if not least < watts < most:
            continue
        ends = max(left, bottom * watts), min(right, top * watts)
        if ends[1] < 1.05 * ends[0]:
            continue
        ax.plot(ends, [x / watts for x in ends], color=theme.grid, linewidth=1, zorder=0)
        ax.annotate(
            f"{watts} W", (ends[1], ends[1] / watts), xytext=(-2, -3), fontsize=8,
            textcoords="offset points", ha="right", va="top", color=theme.grey,
        )  # fmt: skip
    ax.set(xlim=(left, right), ylim=(bottom, top))


# -- distribution --------------------------------------------------------------------------------


@of_rows
def distribution(shown: list[Workload], theme: Theme) -> Figure:
    """The speed of every tile that ran, relative to the winner's; a line for each workload."""
    shown = [w for w in shown if w.best]
    figure, ((ax,),) = frame(
        shown, theme, f"{_about(shown)}: every tile that ran", 1.75 + 0.42 * len(shown),
        "A dot is a tile, moved up or down to be seen. Right: the winner's speed, and how many of "
        "the tiles ran.",
    )  # fmt: skip
    for y, w in enumerate(shown):
        tiles = sorted(filter(ran, w.tiles), key=seconds)
        shares = [speed(t) / speed(w.best) for t in tiles]
        spread = [y + 0.56 * ((0.618034 * i) % 1 - 0.5) for i in range(len(tiles))]
        dots = [i for i, t in enumerate(tiles) if t is not w.best and not t.get("default")]
        ax.plot(
            [shares[i] for i in dots], [spread[i] for i in dots], ".", color=theme.grey,
            alpha=0.75, markersize=6, markeredgewidth=0,
            rasterized=len(tiles) > 200,
        )  # fmt: skip
        for peer in filter(ran, w.peers):
            ax.plot(
                [speed(peer) / speed(w.best)], [y], "|", markersize=17, markeredgewidth=2.6,
                color=theme.impl(peer["impl"]),
            )  # fmt: skip
        default = next((t for t in tiles if t.get("default")), None)
        if default:
            ax.plot(
                [speed(default) / speed(w.best)], [y], "D", markersize=7, color=theme.series[4],
                markeredgecolor=theme.background,
            )  # fmt: skip
        ax.plot([1], [y], "*", markersize=13, color=theme.good, markeredgecolor=theme.background)
        count = f"{len(tiles)} of {len(w.tiles)}"
        text = f"{number_text(speed(w.best))} {unit(w.op)}\n{count}"
        ax.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(8, 0), fontsize=8,
            textcoords="offset points", va="center", linespacing=1.25,
        )  # fmt: skip
    ax.set_yticks(range(len(shown)), labels(shown))
    ax.set(ylim=(len(shown) - 0.5, -0.5), xlabel="speed as a share of the winner's")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(FuncFormatter(_percent))
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    _distribution_legend(figure, shown, theme)
    return figure


def _distribution_legend(figure: Figure, shown: list[Workload], theme: Theme) -> None:
    keys = [_key("*", theme.good, "the winner", 11), _key(".", theme.grey, "a tile")]
    if any(t.get("default") for w in shown for t in w.tiles):
        keys.insert(1, _key("D", theme.series[4], "the default tile", 6))
    peers = {p["impl"] for w in shown for p in w.peers if ran(p)}
    keys += [_key("|", theme.impl(i), IMPL[i], 11, 2.6) for i in IMPL if i in peers]
    legend(figure, keys)


# -- forest --------------------------------------------------------------------------------------


class Speedup(NamedTuple):
    """tilelab's best tile over the fastest peer: above 1 tilelab is faster."""

    workload: Workload
    peer: str
    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Of the 95% interval: "faster", "slower", or "tie" if it spans 1; "unpaired" without."""
        if self.low is None:
            return "unpaired"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "tie"


def speedups(shown: Iterable[Workload]) -> list[Speedup]:
    """Of each workload that was measured with a peer."""
    return [
        Speedup(w, w.best_peer["impl"], *paired(w.best, w.best_peer))
        for w in shown
        if w.measured and w.best and w.best_peer
    ]


@of_rows
def forest(shown: list[Workload], theme: Theme) -> Figure:
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
        _beside(ax, y, f"{s.ratio:.2f}x{bounds} {IMPL[s.peer]}")
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
    legend(figure, [_key("o", colour, label, 6) for colour, label in words])
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

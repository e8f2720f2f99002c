"""The figure of a lesson's ladder: what each of its kernels reaches, from naive to fast.

A rung is a kernel, and a tile says which one it is for: so all that is needed are rows of tiles
with a "kernel" (those without one are of the kernel through pointers), measured or predicted.
"""

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tilelab.perf.report.figures import Theme, frame, labels, legend, of_rows
from tilelab.perf.rows.ranking import Row, Workload, best_tile, known_gpu, number_text, speed, unit
from tilelab.perf.work import gpus
from tilelab.perf.work.search_space import LOWER_RUNGS

# Its name in the legend, and which of the theme's colours. In the order in which a lesson climbs.
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


@of_rows
def ladder(shown: list[Workload], theme: Theme) -> Figure:
    """Speed of each kernel of a lesson, from naive to fast, beside the peak; a group a layer."""
    found = [rungs(w) for w in shown]
    used = [rung for rung in RUNGS if any(rung in f for f in found)]
    how = "measured" if all(w.measured for w in shown) else "compiled, predicted, not measured"
    family = f", {shown[0].family}" if len({w.family for w in shown}) == 1 else ""
    height = 1.75 + BAR * (len(used) + 1) * len(shown)
    figure, ((ax,),) = frame(
        shown, theme, f"{shown[0].op} {shown[0].mode}{family}: from naive to fast", height,
        f"Of each kernel its fastest tile: {how}. Dashed: the peak of the tensor cores.",
    )  # fmt: skip
    places = []
    for group, of in enumerate(found):
        first = group * (len(used) + 1)
        for at, rung in enumerate(used, start=first):
            if rung in of:
                value, (_, colour) = speed(of[rung]), RUNGS[rung]
                ax.barh(at, value, height=0.86, color=theme.series[colour])
                ax.annotate(number_text(value), (value, at), xytext=(4, 0), fontsize=8,
                            textcoords="offset points", va="center")  # fmt: skip
        places.append(first + (len(used) - 1) / 2)
    ax.set_yticks(places, labels(shown))
    ax.set(xlabel=unit(shown[0].op), xlim=(0, 1.06 * _peak(ax, shown[0], found, theme)))
    ax.set_ylim(len(shown) * (len(used) + 1) - 1.3, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    legend(figure, [Patch(facecolor=theme.series[RUNGS[r][1]], label=RUNGS[r][0]) for r in used])
    return figure


def _peak(ax, w: Workload, found: list[dict[str, Row]], theme: Theme) -> float:
    """Draw the GPU's peak, if it is known; return where the axis may end."""
    gpu = known_gpu(w.gpu)
    peak = gpu and gpu.peak(gpus.kind(w.dtype, w.precision))
    if not peak:
        return max(speed(row) for of in found for row in of.values())
    ax.axvline(peak / 1e12, color=theme.grey, linewidth=1.3, linestyle=(0, (5, 3)))
    return peak / 1e12


def text(shown: Iterable[Workload]) -> str:
    """What the figure shows, for those who do not see it."""
    each = []
    for w in shown:
        speeds = (f"{name} {number_text(speed(row))}" for name, row in rungs(w).items())
        each.append(f"{w.label} {', '.join(speeds)}")
    return "; ".join(each)

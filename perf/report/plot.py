"""`tilelab plot`: draws results files, each figure for light and for dark pages.

    tilelab plot results.jsonl --out figures
    tilelab plot results.jsonl --out figures --kind heatmap,forest --format png,svg

heatmap    speed over the block sizes, with registers, spills, occupancy and waves in each cell
curves     speed over sizes or layers, of tilelab and every peer, under the ceiling
roofline   speed over arithmetic intensity
predicted  predicted over measured time of every tile
forest     speed-up over the fastest peer, with its interval
ladder     speed of each of a lesson's kernels, from naive to fast, layer by layer
"""

import argparse
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from tilelab.perf.errors import PerfError
from tilelab.perf.report import figures
from tilelab.perf.report.figures import DARK, LIGHT, Theme
from tilelab.perf.rows import ranking, results
from tilelab.perf.rows.ranking import Workload, workloads

DPI = 200  # 2x: 9 inches are 1,800 pixels, shown as 900
FORMATS = ("png", "svg")
ONE_OP = ("gpu", "measured", "op", "mode", "dtype", "precision", "cache")


class Kind(NamedTuple):
    """A kind of figure: what draws it, and what the workloads of one figure have in common.

    `suits` tells which workloads have something to show, `lacks` what there is not if none has;
    `least` of them make a figure, and `most` fit into one (half as many if they are wide).
    """

    draw: Callable[..., Figure]
    common: tuple[str, ...]
    suits: Callable[[Workload], object]
    lacks: str
    least: int = 1
    most: int = 1000


KINDS = {
    "heatmap": Kind(
        figures.heatmap, (*ONE_OP, "family"), lambda w: any(t.get("tile") for t in w.tiles),
        "no tile was tried", most=6,
    ),
    "curves": Kind(
        figures.curves, (*ONE_OP, "family"), lambda w: w.best or w.best_peer,
        "no two shapes of one operator have a time", least=2, most=30,
    ),
    "roofline": Kind(
        figures.roofline, ("gpu", "measured", "dtype", "precision", "cache"),
        lambda w: w.best and w.best.get("flops") and w.best.get("bytes"), "no tile has a time",
    ),
    "predicted": Kind(
        figures.predicted, ("gpu", "measured", "cache"), lambda w: figures.predicted_rows([w]),
        "no tile has both a measured and a predicted time", most=10**9,
    ),
    "forest": Kind(
        figures.forest, ONE_OP, lambda w: ranking.speedups([w]),
        "no tile was measured beside a peer", most=36,
    ),
    "ladder": Kind(
        figures.ladder, (*ONE_OP, "family"), figures.climbs,
        "no workload has tiles of a kernel that a lesson begins with (-a kernel=direct,flat)",
        most=8,
    ),
}  # fmt: skip


class Page(NamedTuple):
    """One figure to draw: its kind, the name of its files, and what it shows."""

    kind: str
    name: str
    workloads: list[Workload]


def pages(kind: str, shown: Sequence[Workload]) -> list[Page]:
    """Divide work among the figures of a kind: one operator, one GPU, and not too many panels."""
    about = KINDS[kind]
    groups: dict[tuple, list[Workload]] = {}
    for w in filter(about.suits, shown):
        groups.setdefault(tuple(getattr(w, name) for name in about.common), []).append(w)
    gpus = {w.gpu for w in shown}
    found = []
    for group in groups.values():
        if len(group) < about.least:
            continue
        wide = kind == "heatmap" and figures.is_wide(group)
        parts = _split(group, about.most // 2 if wide else about.most)
        for number, part in enumerate(parts, start=1):
            name = _name(kind, part[0], about.common, several_gpus=len(gpus) > 1)
            name += f"-{number}" if len(parts) > 1 else ""
            found.append(Page(kind, name, part))
    return found


def _split(group: list[Workload], most: int) -> list[list[Workload]]:
    """Parts of nearly one size, each of `most` at most."""
    parts = -(-len(group) // most)
    size = -(-len(group) // parts)
    return [group[i : i + size] for i in range(0, len(group), size)]


def _name(kind: str, w: Workload, common: Sequence[str], several_gpus: bool) -> str:
    """The name of a figure's files, of letters, digits, dots and dashes."""
    parts = [kind]
    parts += [w.op, w.mode] if "op" in common else []
    parts += [ranking.dtype_text(w.dtype, w.precision)] if "dtype" in common else []
    parts += [w.family] if "family" in common else []
    parts += ["hot"] if w.cache == "hot" else []
    parts += [w.gpu] if several_gpus else []
    parts += [] if w.measured else ["predicted"]
    words = [re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts]
    return "-".join(filter(None, words)).lower()


def render(page: Page, theme: Theme, form: str) -> bytes:
    """A figure as the bytes of a PNG (2x) or SVG file."""
    buffer = io.BytesIO()
    with figures.style(theme):
        figure = KINDS[page.kind].draw(page.workloads, theme)
        if form == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            return _compact(buffer.getvalue().decode()).encode()
        figure.savefig(buffer, format="png", dpi=DPI)
    return smaller(buffer)


def _compact(svg: str) -> str:
    """The same picture in half the bytes: fewer digits, one font for all, no line breaks."""
    font = re.search(r"font-family: [^;\"]+", svg)
    if font:
        svg = svg.replace(f"{font[0]};", "").replace("</style>", f"text{{{font[0]}}}</style>", 1)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"| id="[a-z]+\w*[_.][\w.]*"', "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><")


def smaller(png: io.BytesIO) -> bytes:
    """The same picture with a palette: a figure has few colours, and a third of the bytes then."""
    buffer = io.BytesIO()
    image = Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(buffer, format="png", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def save(page: Page, folder: str | Path, forms: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure for light and for dark pages, whole: name-light.png, name-dark.png."""
    paths = []
    for theme in (LIGHT, DARK):
        for form in forms:
            paths.append(Path(folder) / f"{page.name}-{theme.name}.{form}")
            results.write_whole(paths[-1], render(page, theme, form))
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to draw of which files, and whereto."""
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results files (JSON lines)")
    parser.add_argument("--out", default="figures", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--kind", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)"
    )
    parser.add_argument(
        "--format", default="png", help="png, svg or png,svg (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw; say what was written, and for what there are no rows."""
    kinds = _choice(args.kind, KINDS, "kind")
    forms = _choice(args.format, FORMATS, "format")
    shown = workloads(ranking.read(args.results)[1])
    written = 0
    for kind in kinds:
        found = pages(kind, shown)
        if not found:
            print(f"{kind}: nothing to show: {KINDS[kind].lacks}")
        for page in found:
            for path in save(page, args.out, forms):
                print(path)
                written += 1
    if not written:
        raise PerfError(f"nothing to draw: no figure of {', '.join(kinds)} has rows to show")
    return 0


def _choice(text: str, known: Iterable[str], what: str) -> list[str]:
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in chosen if word not in known]
    if unknown or not chosen:
        raise PerfError(f"unknown {what} {', '.join(unknown) or repr(text)}: {', '.join(known)}")
    return list(dict.fromkeys(chosen))

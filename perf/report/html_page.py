"""`tilelab report`: one HTML page of results files, which needs nothing but a browser.

    tilelab report results.jsonl --out report.html

Everything is in the page: the figures (SVG, for light and for dark), the style, and a few lines of
script that sort and filter the table. The page asks nothing of any network, and its
Content-Security-Policy tells the browser so. What comes from the results files is text, never
markup.
"""

import argparse
import base64
import datetime
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from tilelab.perf.report import diagnosis, figures, plot
from tilelab.perf.report.figures import DARK, LIGHT
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.rows.ranking import (
    NAMES,
    Row,
    Speedup,
    Workload,
    dtype_text,
    has_result,
    number_text,
    seconds,
    speed,
    speedups,
    tile_label,
    tile_text,
    unit,
)

MOST_ROWS = 5000  # of the table at the end; more make a page slow
WHOLE = ("roofline", "predicted")  # kinds of figures that are about a whole GPU
OF_ONE = ("forest", "curves", "ladder", "heatmap")  # about one operator and mode


class Picture(NamedTuple):
    """A figure for light and for dark pages, as data URIs, and what it shows in words."""

    light: str
    dark: str
    alt: str


class Section(NamedTuple):
    """One operator, mode and dtype on one GPU."""

    anchor: str
    title: str
    measured: bool
    workloads: list[Workload]
    pictures: list[Picture]
    boards: list[tuple[Workload, list[ranking.Entrant], diagnosis.Table]]
    speedups: list[Speedup]

    @property
    def mean(self) -> float | None:
        """The geometric mean of the speed-ups."""
        return stats.geomean([s.ratio for s in self.speedups]) if self.speedups else None

    @property
    def verdicts(self) -> Counter:
        """How many workloads are faster, slower, tied and unpaired."""
        return Counter(s.verdict for s in self.speedups)


def build(headers: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """Make the page, as HTML, of what `ranking.read` gave."""
    sections = _sections(rows)
    shown = [w for section in sections for w in section.workloads]
    table, left_out = _rows_table(shown)
    return _template().render(
        title="tilelab on " + ", ".join(dict.fromkeys(header["gpu"] for header in headers)),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=_runs(headers),
        predicted=any(not section.measured for section in sections),
        sections=sections,
        whole=_pictures(WHOLE, shown),
        columns={title: bool(form) for title, (_, form) in COLUMNS.items()},
        table=table,
        left_out=left_out,
        names=NAMES,
        titles=diagnosis.TITLES,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tile": tile_text, "ratio": _ratio}
    return environment.get_template("html_page.html.jinja")


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


# -- what was measured on what -------------------------------------------------------------------


def _runs(headers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The headers, each as words; a sweep that was resumed with nothing changed is one."""
    runs: dict[str, dict[str, Any]] = {}
    for header in headers:
        facts = _facts(header)
        about = {"facts": facts, "gpu": header["gpu"], "measured": header["measured"], "times": []}
        run = runs.setdefault(repr((facts, header["measured"])), about)
        run["times"].append(header["created"][:16].replace("T", " "))
    return list(runs.values())


def _facts(header: dict[str, Any]) -> list[tuple[str, str]]:
    clocks, host = header.get("clocks_mhz") or {}, header.get("host") or {}
    versions = header.get("versions") or {}
    commit = header.get("commit") or "not known"
    if header.get("dirty"):
        commit += " and changes that are not committed"
    facts = {
        "target": header.get("target"),
        "driver": header.get("driver"),
        "clocks": ", ".join(f"{name} {mhz} MHz" for name, mhz in clocks.items() if mhz),
        "power limit": header.get("power_limit_w") and f"{header['power_limit_w']:g} W",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "commit": commit,
        "host": ", ".join(
            filter(None, (host.get("cpu"), host.get("cores") and f"{host['cores']} cores"))
        ),
        "seed": header.get("seed"),
        "command": " ".join(header.get("command") or []),
        "note": header.get("note"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


# -- operators -----------------------------------------------------------------------------------


def _sections(rows: Sequence[Row]) -> list[Section]:
    groups: dict[tuple, list[diagnosis.Table]] = {}
    for table in diagnosis.table(rows):
        about = tuple(getattr(table.workload, name) for name in plot.ONE_OP)
        groups.setdefault(about, []).append(table)
    several = len({table.workload.gpu for tables in groups.values() for table in tables}) > 1
    found = []
    for number, tables in enumerate(groups.values(), start=1):
        shown = [table.workload for table in tables]
        first = shown[0]
        title = first.title + (", hot cache" if first.cache == "hot" else "")
        found.append(
            Section(
                anchor=f"op{number}",
                title=title + (f", {first.gpu}" if several else ""),
                measured=first.measured,
                workloads=shown,
                pictures=_pictures(OF_ONE, shown),
                boards=[(t.workload, ranking.leaderboard(t.workload, 5), t) for t in tables],
                speedups=speedups(shown),
            )
        )
    return found


# -- figures -------------------------------------------------------------------------------------


def _pictures(kinds: Iterable[str], shown: Sequence[Workload]) -> list[Picture]:
    return [_picture(page) for kind in kinds for page in plot.pages(kind, shown)]


def _picture(page: plot.Page) -> Picture:
    svgs = (base64.b64encode(plot.render(page, theme, "svg")) for theme in (LIGHT, DARK))
    light, dark = (f"data:image/svg+xml;base64,{svg.decode()}" for svg in svgs)
    return Picture(light, dark, alt_text(page))


def alt_text(page: plot.Page) -> str:
    """What a figure shows, for those who do not see it: its kind, and its main numbers."""
    shown = page.workloads
    kind = (plot.KINDS[page.kind].draw.__doc__ or "").splitlines()[0].rstrip(".")
    words = f"{kind}. {figures.provenance(shown)}."
    words += "" if all(w.measured for w in shown) else " Predicted, not measured."
    if page.kind == "predicted":
        rows = figures.predicted_rows(shown)
        return f"{words} Median error {figures.prediction_error(rows):.0%} of {len(rows)} tiles."
    if page.kind == "ladder":
        return f"{words} TFLOP/s: {figures.ladder_text(shown)}."
    if page.kind == "forest":
        found = speedups(shown)
        mean = stats.geomean([s.ratio for s in found])
        each = "; ".join(f"{s.workload.label} {s.ratio:.2f}x" for s in found)
        return f"{words} Geometric mean {mean:.2f}x: {each}."
    best = [
        f"{w.label} {number_text(speed(w.best))} {unit(w.op)} with {tile_text(w.best['tile'])}"
        for w in shown
        if w.best
    ]
    return f"{words} Best tiles: {'; '.join(best[:12])}." if best else words


# -- all rows ------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What is written, what to sort by (None: comes last), and whether that is a number."""

    text: str
    value: Any
    is_number: bool


Fill = Callable[[Workload, Row], Any]


def _field(name: str, unit: float = 1) -> Fill:
    """A column that is a field of the rows, in this unit."""
    return lambda w, row: None if row.get(name) is None else row[name] / unit


def _status(w: Workload, row: Row) -> str:
    return "screened" if (row["status"], row["stage"]) == ("ok", "screen") else row["status"]


COLUMNS: dict[str, tuple[Fill, str]] = {  # title: its value (None: empty), and how it is written
    "GPU": (lambda w, row: w.gpu, ""),
    "operator": (lambda w, row: f"{w.op} {w.mode}", ""),
    "dtype": (lambda w, row: dtype_text(w.dtype, w.precision), ""),
    "shape": (lambda w, row: w.name, ""),
    "implementation": (lambda w, row: NAMES[row["impl"]], ""),
    "tile": (lambda w, row: tile_label(row), ""),
    "stage": (lambda w, row: row["stage"], ""),
    "status": (_status, ""),
    "time (µs)": (_field("median_s", 1e-6), ",.4g"),
    "speed": (lambda w, row: speed(row), ",.4g"),
    "unit": (lambda w, row: unit(w.op), ""),
    "of peak": (_field("peak_share"), ".0%"),
    "registers": (_field("registers"), ".0f"),
    "spills (B)": (_field("spills"), ".0f"),
    "shared (KiB)": (_field("shared", 1024), ".0f"),
    "occupancy": (_field("occupancy"), ".0%"),
    "waves": (_field("waves"), ".2f"),
    "padding": (_field("padding"), ".2f"),
    "predicted (µs)": (_field("predicted_s", 1e-6), ",.4g"),
    "energy (J)": (_field("joules"), ".3g"),
    "error": (_field("error"), ".2g"),
    "reason": (lambda w, row: row.get("reason"), ""),
}


def _rows_table(shown: Iterable[Workload]) -> tuple[list[list[Cell]], int]:
    """A line a tile and peer; and how many were left out."""
    rows = [
        (w, row)
        for w in shown
        for row in sorted((*w.tiles, *w.peers), key=lambda row: seconds(row) or math.inf)
    ]
    kept = sorted(rows, key=lambda pair: not has_result(pair[1]))[:MOST_ROWS]  # no time: last
    return [_line(w, row) for w, row in kept], len(rows) - len(kept)


def _line(w: Workload, row: Row) -> list[Cell]:
    cells = []
    for fill, form in COLUMNS.values():
        value = fill(w, row)
        cells.append(Cell("" if value is None else format(value, form), value, bool(form)))
    return cells


# -- command line --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which files to report, and whereto."""
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results files (JSON lines)")
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; say where it is and how large."""
    size = write(*ranking.read(args.results), Path(args.out))
    print(f"{args.out}: {size / 1e6:.1f} MB")
    return 0


def write(headers: Sequence[dict[str, Any]], rows: Sequence[Row], out: Path) -> int:
    """Write the page of what `ranking.read` gave, whole; return its size in bytes."""
    page = build(headers, rows).encode()
    results.write_whole(out, page)
    return len(page)

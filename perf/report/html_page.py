"""`tilelab report`: one HTML page of results files, that needs nothing but a browser.

    tilelab report results.jsonl --out report.html

Everything is in the page: the figures (SVG, for light and for dark), the style, and a few lines of
script that sort and filter the table. It asks nothing of any network, and says so to the browser
(Content-Security-Policy). What comes from the results files is text, never markup.
"""

import argparse
import base64
import datetime
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tilelab.perf.report import diagnosis, figures, ladder, plot
from tilelab.perf.report.figures import DARK, IMPL, LIGHT, Speedup, speedups
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.rows.ranking import (
    Row,
    Workload,
    dtype_text,
    number_text,
    ran,
    seconds,
    speed,
    tile_text,
    unit,
)

MOST_ROWS = 5000  # of the table at the end; more make a page slow
WHOLE = ("roofline", "predicted")  # kinds of figures that are about a whole GPU
# Kinds about one operator and mode.
OF_ONE = ("forest", "curves", "ladder", "heatmap", "energy", "distribution")


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
    gpu: str
    workloads: list[Workload]
    pictures: list[Picture]
    boards: list[tuple[Workload, list[dict[str, str]], diagnosis.Table]]
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
    """Make the page.

    Args:
        headers: of results files.
        rows: of the same files, as `ranking.read` gives them.

    Returns:
        HTML.
    """
    sections = _sections(rows)
    table, left_out = _rows_table([w for section in sections for w in section.workloads])
    return _template().render(
        title=_title(headers),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=_runs(headers),
        predicted=any(not section.measured for section in sections),
        sections=sections,
        whole=[_picture(page) for kind in WHOLE for page in plot.pages(kind, rows)],
        columns=COLUMNS,
        table=table,
        left_out=left_out,
        impl=IMPL,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tile": tile_text, "ratio": _ratio, "heading": diagnosis.heading}
    return environment.get_template("html_page.html.jinja")


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _title(headers: Sequence[dict[str, Any]]) -> str:
    return "tilelab on " + ", ".join(dict.fromkeys(header["gpu"] for header in headers))


# -- what was measured on what -------------------------------------------------------------------


def _runs(headers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The headers, each as words; a sweep that was resumed with nothing changed is one."""
    runs: dict[str, dict[str, Any]] = {}
    for header in headers:
        facts = _facts(header)
        run = runs.setdefault(repr(facts), {"facts": facts, "gpu": header["gpu"], "times": []})
        run |= {"measured": header["measured"], "note": header.get("note") or ""}
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
        mine = [row for w in shown for row in (*w.tiles, *w.peers)]
        title = first.title + (", hot cache" if first.cache == "hot" else "")
        found.append(
            Section(
                anchor=f"op{number}",
                title=title + (f", {first.gpu}" if several else ""),
                measured=first.measured,
                gpu=first.gpu,
                workloads=shown,
                pictures=[_picture(page) for kind in OF_ONE for page in plot.pages(kind, mine)],
                boards=[(table.workload, _board(table.workload), table) for table in tables],
                speedups=speedups(shown),
            )
        )
    return found


def _board(w: Workload, top: int = 5) -> list[dict[str, str]]:
    """The fastest tiles and every peer, each with what a line of the table shows."""
    best = w.best
    tiles = sorted(filter(ran, w.tiles), key=lambda row: (row is not best, ranking.rank(row)))[:top]
    lines = []
    for row in sorted([*tiles, *filter(ran, w.peers)], key=seconds):
        interval = ""
        if row.get("low_s") and row.get("high_s"):
            slow, fast = speed(row, row["high_s"]), speed(row, row["low_s"])
            interval = f"{number_text(slow)} to {number_text(fast)}"
        lines.append(
            {
                "name": IMPL[row["impl"]],
                "tile": tile_text(row.get("tile")),
                "time": ranking.time_text(seconds(row)),
                "speed": f"{number_text(speed(row))} {unit(w.op)}",
                "interval": interval,
                "share": f"{row['peak_share']:.0%}" if row.get("peak_share") is not None else "",
                "ratio": ranking.paired_text(row, best),
                "best": row is best,
            }
        )
    return lines


# -- figures -------------------------------------------------------------------------------------


def _picture(page: plot.Page) -> Picture:
    draw = plot.KINDS[page.kind].draw
    light, dark = (_uri(plot.render(draw, page.rows, theme, "svg")) for theme in (LIGHT, DARK))
    return Picture(light, dark, alt_text(page))


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def alt_text(page: plot.Page) -> str:
    """What a figure shows, for those who do not see it: its kind, and its main numbers."""
    shown = ranking.workloads(page.rows)
    kind = (plot.KINDS[page.kind].draw.__doc__ or "").splitlines()[0].rstrip(".")
    words = f"{kind}. {figures.provenance(shown)}."
    words += "" if all(w.measured for w in shown) else " Predicted, not measured."
    if page.kind == "predicted":
        rows = figures.predicted_rows(shown)
        return f"{words} Median error {figures.prediction_error(rows):.0%} of {len(rows)} tiles."
    if page.kind == "ladder":
        return f"{words} TFLOP/s: {ladder.text(shown)}."
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

# Columns of the table of all rows: title, and whether it is a number.
COLUMNS = (
    ("GPU", False), ("operator", False), ("dtype", False), ("shape", False),
    ("implementation", False), ("tile", False), ("stage", False), ("status", False),
    ("time (µs)", True), ("speed", True), ("unit", False), ("of peak", True), ("registers", True),
    ("spills (B)", True), ("shared (KiB)", True), ("occupancy", True), ("waves", True),
    ("padding", True), ("predicted (µs)", True), ("energy (J)", True), ("error", True),
    ("reason", False),
)  # fmt: skip


def _rows_table(shown: Iterable[Workload]) -> tuple[list[list[tuple[str, Any]]], int]:
    """A line a tile and peer, of cells (text, what to sort by); and how many were left out."""
    rows = [
        (w, row)
        for w in shown
        for row in sorted((*w.tiles, *w.peers), key=lambda row: seconds(row) or math.inf)
    ]
    kept = sorted(rows, key=lambda pair: not ran(pair[1]))[:MOST_ROWS]  # those without a time last
    return [_line(w, row) for w, row in kept], len(rows) - len(kept)


def _line(w: Workload, row: Row) -> list[tuple[str, Any]]:
    micro = lambda name: row[name] * 1e6 if row.get(name) else None  # noqa: E731
    status = row["status"] if row["status"] != "ok" or row["stage"] != "screen" else "screened"
    numbers = {
        "time (µs)": (micro("median_s"), "{:,.4g}"),
        "speed": (speed(row), "{:,.4g}"),
        "of peak": (row.get("peak_share"), "{:.0%}"),
        "registers": (row.get("registers"), "{}"),
        "spills (B)": (row.get("spills"), "{}"),
        "shared (KiB)": (row["shared"] / 1024 if row.get("shared") else None, "{:.0f}"),
        "occupancy": (row.get("occupancy"), "{:.0%}"),
        "waves": (row.get("waves"), "{:.2f}"),
        "padding": (row.get("padding"), "{:.2f}"),
        "predicted (µs)": (micro("predicted_s"), "{:,.4g}"),
        "energy (J)": (row.get("joules"), "{:.3g}"),
        "error": (row.get("error"), "{:.2g}"),
    }
    texts = {
        "GPU": w.gpu,
        "operator": f"{w.op} {w.mode}",
        "dtype": dtype_text(w.dtype, w.precision),
        "shape": w.name,
        "implementation": IMPL[row["impl"]],
        "tile": tile_text(row.get("tile")),
        "stage": row["stage"],
        "status": status,
        "unit": unit(w.op),
        "reason": row.get("reason") or "",
    }
    cells = []
    for name, is_number in COLUMNS:
        if not is_number:
            cells.append((texts[name], texts[name]))
            continue
        value, form = numbers[name]
        cells.append(("", "") if value is None else (form.format(value), value))
    return cells


# -- command line --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which files to report, and whereto."""
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results files (JSON lines)")
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; say where it is and how large.

    Raises:
        PerfError: for files that cannot be read or written.
    """
    size = write(*ranking.read(args.results), Path(args.out))
    print(f"{args.out}: {size / 1e6:.1f} MB")
    return 0


def write(headers: Sequence[dict[str, Any]], rows: Sequence[Row], out: Path) -> int:
    """Write the page of what `ranking.read` gave, whole; return its size in bytes.

    Raises:
        PerfError: if it cannot be written.
    """
    page = build(headers, rows).encode()
    results.write_whole(out, page)
    return len(page)

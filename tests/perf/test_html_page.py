"""The report: one page that is valid, complete, safe, and asks nothing of any network."""

import argparse
import base64
import html.parser
import re
import shutil
import subprocess

import pytest

from tests.tools import perf_rows
from tilelab.perf.report import html_page
from tilelab.perf.rows import ranking
from tilelab.perf.rows.ranking import number_text, speed, workloads

EVIL = "\"><script>alert(1)</script><img src=https://example.org/x onerror='alert(2)'>&amp;{{7*7}}"
VOID = {"meta", "link", "img", "source", "input", "br"}


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and whether all were closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sweep that was resumed, and one without a GPU."""
    folder = tmp_path_factory.mktemp("results")
    measured = [
        *(perf_rows.workload(perf_rows.matmul(size), size, 24) for size in (512, 1024, 2048)),
        perf_rows.workload(perf_rows.softmax(4096, 4096), 1, 12),
    ]
    first = perf_rows.header()
    second = perf_rows.header() | {"created": "2000-01-02T00:00:00+00:00"}
    rows = [row for part in measured for row in part]
    offline = perf_rows.workload(perf_rows.matmul(4096), 1, 12, measured=False)
    return [
        perf_rows.write(folder / "h200.jsonl", first, *rows[:40], second, *rows[40:]),
        perf_rows.write(folder / "sm_90.jsonl", perf_rows.header(measured=False), *offline),
    ]


@pytest.fixture(scope="module")
def text(files):
    return html_page.build(*ranking.read(files))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_it_is_one_page_that_is_well_formed(text, page):
    assert text.startswith("<!DOCTYPE html>") and page.open == []
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and len(page.all("title")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        assert attributes["href"].removeprefix("#") in ids
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    assert len(text) < 3_000_000


def test_nothing_is_asked_of_a_network(text, page):
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert "@import" not in text and "url(" not in re.sub(r"base64,[^\"]*", "", text)
    (policy,) = [m for m in page.all("meta") if m.get("http-equiv")]
    assert policy["content"].startswith("default-src 'none'")
    for uri in re.findall(r"base64,([^\"]+)", text):
        svg = base64.b64decode(uri).decode()
        assert not re.search(r"(href|src)=\"(?!#|data:)", svg)


def test_figures_are_there_for_light_and_dark_and_in_words(page):
    images, sources = page.all("img"), page.all("source")
    assert len(images) == len(sources) == len(page.all("picture")) >= 9
    for image, source in zip(images, sources, strict=True):
        assert source["media"] == "(prefers-color-scheme: dark)"
        light, dark = (
            base64.b64decode(uri.split(",")[1]).decode() for uri in (image["src"], source["srcset"])
        )
        assert "#ffffff" in light and "#0d1117" in dark and light != dark
        assert len(image["alt"]) > 60
    alts = " ".join(image["alt"] for image in images)
    assert "Geometric mean" in alts and "Median error" in alts and "Predicted, not measured" in alts


def test_it_says_what_was_measured_on_what(page):
    said = " ".join(" ".join(page.text).split())
    for fact in (
        perf_rows.GPU, perf_rows.NOTE, "570.00", "torch 2.13.0, triton 3.9.0",
        perf_rows.header()["commit"] + " and changes that are not committed", "700 W",
        "2000-01-01 00:00 UTC, resumed 1 time, last 2000-01-02 00:00 UTC",
        "sm 1755 MHz, memory 3201 MHz", "a CPU (synthetic), 16 cores", "tilelab sweep",
    ):  # fmt: skip
        assert fact in said, fact
    assert said.count("resumed") == 1
    assert "predicted, not measured" in said


@pytest.fixture
def no_pictures(monkeypatch):
    """Figures take nearly all of the time, and are not what is tested."""
    monkeypatch.setattr(html_page, "_pictures", lambda kinds, shown: [])


def test_a_page_of_measurements_does_not_mention_predictions(files, no_pictures):
    assert "not measured" not in html_page.build(*ranking.read(files[:1]))


def test_the_overview_has_the_geometric_means(files, page, no_pictures):
    _, rows = ranking.read(files)
    said = " ".join(" ".join(page.text).split())
    for section in html_page._sections(rows):
        if section.speedups:
            assert f"{section.mean:.2f}x" in said
            assert sum(section.verdicts.values()) == len(section.workloads)
    assert "no peer was measured" in said  # of the predicted section


def test_every_tile_and_peer_is_in_the_table(files, page):
    _, rows = ranking.read(files)
    count = sum(len(w.tiles) + len(w.peers) for w in workloads(rows))
    body = [a for a in page.all("td") if "data-v" in a]
    numbers = sum(bool(form) for _, form in html_page.COLUMNS.values())
    assert len(body) == count * numbers
    lines, left_out = html_page._rows_table(workloads(rows))
    assert len(lines) == count and left_out == 0
    best = workloads(rows)[0].best
    values = [dict(zip(html_page.COLUMNS, line, strict=True)) for line in lines]
    (line,) = [
        v for v in values
        if v["tile"].text == ranking.tile_label(best)
        and v["shape"].text == best["shape_name"]
    ]  # fmt: skip
    assert line["time (µs)"].value == pytest.approx(best["median_s"] * 1e6)
    assert line["registers"] == (str(best["registers"]), best["registers"], True)
    assert line["status"].text == "ok" and line["stage"].text == "final"
    assert "screened" in {v["status"].text for v in values}


def test_a_very_long_table_is_cut_and_says_so(files, monkeypatch, no_pictures):
    monkeypatch.setattr(html_page, "MOST_ROWS", 10)
    headers, rows = ranking.read(files)
    assert re.search(r"\d+ rows without a time", html_page.build(headers, rows))


def test_every_losing_tile_has_its_reason(files, page):
    _, rows = ranking.read(files)
    said = " ".join(page.text)
    for table in html_page.diagnosis.table(rows):
        for verdict in table.verdicts:
            if verdict.code != "best":
                assert verdict.words in said
    best = workloads(rows)[0].best
    assert f"{number_text(speed(best))} TFLOP/s" in said


def evil_report(tmp_path):
    rows = [
        row | {"shape_name": f"{EVIL} {row['shape']['M']}", "reason": EVIL, "tile_op": EVIL}
        for size in (512, 1024)
        for row in perf_rows.workload(perf_rows.matmul(size), size, 24)
    ]
    for row in rows:
        if row["tile"]:
            row["tile"] = row["tile"] | {f"BLOCK_{EVIL}": 1, EVIL: "\x00\x1b[31m"}
            row["limit"] = row["tensor_core"] = EVIL
    head = perf_rows.header() | dict(
        gpu=EVIL, note=EVIL, driver=EVIL, commit=EVIL, command=[EVIL], host=dict(cpu=EVIL, cores=1),
        versions=perf_rows.header()["versions"] | {EVIL: EVIL},
    )  # fmt: skip
    path = perf_rows.write(tmp_path / "evil.jsonl", head, *rows)
    return html_page.build(*ranking.read([path]))


def test_what_comes_from_a_file_is_text(tmp_path):
    text = evil_report(tmp_path)
    page = Page(text)
    assert page.open == []
    assert len(page.all("script")) == 1 and text.count("alert(1)</script>") == 0
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/svg+xml")
    said = "".join(page.text)
    assert EVIL in said  # as it was, and {{7*7}} is not 49
    assert not re.search(r"[\x00-\x08\x0e-\x1f]", text)
    for uri in re.findall(r"base64,([^\"]+)", text):
        assert "<script" not in base64.b64decode(uri).decode()


# -- in a browser --------------------------------------------------------------------------------


CHROMIUM = shutil.which("chromium")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


def browse(path, folder, *flags):
    """What chromium writes to standard output and error when it opens a file."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0",
        f"--log-net-log={folder / 'net.json'}", *flags, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


PROBE = """
<script>
addEventListener("load", () => {
const column = heads.findIndex((head) => head.textContent.startsWith("speed"));
const values = () => [...body.rows].map((row) => row.cells[column].dataset.v);
heads[column].firstElementChild.click();
const up = values();
heads[column].firstElementChild.click();
const down = values();
filter.value = "512 tilelab";
filter.dispatchEvent(new Event("input"));
const shown = [...body.rows].filter((row) => !row.hidden).length;
const wide = document.documentElement.scrollWidth > window.innerWidth;
const drawn = [...document.images].every((image) => image.complete && image.naturalWidth > 300);
const sorted = (list, sign) => list.filter((v) => v !== "").map(Number)
  .every((v, i, all) => !i || sign * (v - all[i - 1]) >= 0);
const last = (list) => list.indexOf("") < 0 || list.slice(list.indexOf("")).every((v) => v === "");
const asked = performance.getEntriesByType("resource").map((entry) => entry.name)
  .filter((name) => !name.startsWith("data:"));
console.log("PROBE " + JSON.stringify({asked, up: sorted(up, 1), down: sorted(down, -1),
  last: last(up) && last(down), shown, wide, drawn, count: body.rows.length}));
});
</script>
"""


@in_a_browser
def test_the_page_in_a_browser(text, files, tmp_path):
    """It opens without an error or a request, draws, sorts and filters, at the width of a phone."""
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", PROBE + "</body>"))
    done = browse(path, tmp_path, "--dump-dom", "--window-size=500,900")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (probe,) = [line for line in console if "PROBE" in line]
    assert len(console) == 1, console  # nothing else: no error, no refused request
    for fact in (
        '"up":true',
        '"down":true',
        '"last":true',
        '"wide":false',
        '"drawn":true',
        '"asked":[]',
    ):
        assert fact in probe, probe
    shown, count = (int(re.search(rf'"{n}":(\d+)', probe)[1]) for n in ("shown", "count"))
    _, rows = ranking.read(files)
    small = next(w for w in workloads(rows) if w.name == "square 512")
    assert len(small.tiles) <= shown < count  # other rows may have 512 in them, too
    assert "</html>" in done.stdout


@in_a_browser
def test_malice_in_a_browser(tmp_path):
    path = tmp_path / "evil.html"
    path.write_text(evil_report(tmp_path))
    done = browse(path, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr and "</html>" in done.stdout
    assert "example.org" not in (tmp_path / "net.json").read_text()


# -- command line --------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    html_page.add_arguments(parser)
    rows = perf_rows.workload(perf_rows.adamw(2**16), count=4, measured=False)
    path = perf_rows.write(tmp_path / "r.jsonl", perf_rows.header(False), *rows)
    out = tmp_path / "folder" / "page.html"
    assert html_page.run(parser.parse_args([str(path), "--out", str(out)])) == 0
    assert re.fullmatch(rf"{re.escape(str(out))}: 0\.\d MB\n", capsys.readouterr().out)
    assert "adamw step, float32" in out.read_text()
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]

"""Figures: what they say is right, they can be drawn of every file there may be, and be read.

The rows are synthetic (perf_rows.py).
"""

import argparse
import io
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from tests.tools import perf_rows
from tilelab.perf.errors import PerfError
from tilelab.perf.report import figures, plot
from tilelab.perf.report.figures import DARK, LIGHT
from tilelab.perf.report.html_page import alt_text
from tilelab.perf.rows import ranking, results, stats
from tilelab.perf.rows.ranking import seconds, speed, workloads


@pytest.fixture(scope="module")
def rows():
    return [row | {"commit": "0123abc+"} for row in perf_rows.rows(count=24)]


@pytest.fixture(scope="module")
def shown(rows):
    return workloads(rows)


@pytest.fixture(scope="module")
def matmuls(shown):
    return [w for w in shown if w.op == "matmul"]


@pytest.fixture(scope="module")
def layers(shown):
    return [w for w in shown if (w.op, w.mode) == ("conv2d", "fwd")]


def changed(shown, **fields):
    """The same work from rows that differ in these fields."""
    return workloads(row | fields for w in shown for row in (*w.tiles, *w.peers))


def written(figure):
    """The texts of a figure, and those of its legends and ticks."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("kind", plot.KINDS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_every_kind_can_be_read(kind, theme, shown):
    """Nothing is clipped or tiny, the colours are the theme's, and it says where it comes from."""
    if kind == "ladder":
        shown = changed(workloads(perf_rows.ladder()), commit="0123abc+")
    page = plot.pages(kind, shown)[0]
    with figures.style(theme):
        figure = plot.KINDS[kind].draw(page.workloads, theme)
        renderer = FigureCanvasAgg(figure).get_renderer()
        texts = " ".join(written(figure))
    assert figure.get_size_inches()[0] == 9
    assert to_hex(figure.get_facecolor()) == theme.background
    for text in figure.findobj(Text):
        if not text.get_text() or not text.get_visible() or text in beyond(figure):
            continue
        box = text.get_window_extent(renderer)
        assert text.get_fontsize() >= 7, text
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height, text
        if not text.get_bbox_patch() and not inside_a_cell(text):
            assert contrast(text.get_color(), theme.background) >= 4.5, text
    for fact in (perf_rows.GPU, "bfloat16", "2000-01-01", "commit 0123abc+"):
        assert fact in texts
    assert "not measured" not in texts


def beyond(figure):
    """Labels of ticks that are not drawn, as they lie outside of their axis."""
    return {
        label
        for ax in figure.axes
        for axis, ends in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim()))
        for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not min(ends) <= tick <= max(ends)
    }


def inside_a_cell(text):
    return text.axes is not None and any(
        isinstance(p, Rectangle) and p.get_window_extent().contains(*centre(text))
        for p in text.axes.patches
    )


def centre(text):
    box = text.get_window_extent()
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def contrast(one, other):
    """As in WCAG: 4.5 is what small text needs."""

    def luminance(colour):
        channels = np.array(to_rgb(colour))
        linear = np.where(channels < 0.0405, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_series_stand_out_from_the_page(theme):
    for colour in theme.series[:4]:
        assert contrast(colour, theme.background) >= 2.8
    assert len(set(theme.series)) == len(theme.series)


@pytest.mark.parametrize("kind", ["heatmap", "curves", "roofline"])
def test_predicted_rows_are_called_so(kind):
    shown = workloads(perf_rows.rows(count=12, measured=False, only="matmul"))
    (page,) = plot.pages(kind, shown)
    assert page.name.endswith("-predicted")
    texts = written(plot.KINDS[kind].draw(page.workloads))
    assert "predicted, not measured" in texts
    assert any(perf_rows.COMPILED in text for text in texts)


@pytest.mark.parametrize("kind", ["predicted", "forest"])
def test_kinds_that_need_measurements_have_no_page_of_predictions(kind):
    shown = workloads(perf_rows.rows(count=6, measured=False, only="softmax"))
    assert plot.pages(kind, shown) == []


# -- heat-map ------------------------------------------------------------------------------------


def cells(ax):
    """What is written on each cell of a panel, by (BLOCK_N, BLOCK_M)."""
    across = [int(t.get_text()) for t in ax.get_xticklabels()]
    down = [int(t.get_text() or 0) for t in ax.get_yticklabels()]
    found = {}
    for text in ax.texts:
        x, y = (round(v) for v in text.get_position())
        found.setdefault((across[x], down[y]), []).append(text.get_text())
    return found


def test_heatmap_has_the_best_of_each_pair_of_blocks(matmuls):
    figure = figures.heatmap(matmuls)
    panels = [ax for ax in figure.axes if ax.patches]
    assert len(panels) == len(matmuls) == 5
    for ax, w in zip(panels, matmuls, strict=True):
        for (n, m), texts in cells(ax).items():
            tiles = [
                t for t in w.tiles
                if (t["tile"]["BLOCK_M"], t["tile"]["BLOCK_N"]) == (m, n) and t["status"] == "ok"
            ]  # fmt: skip
            if not tiles:
                assert texts[0].startswith(("spills", "does not fit", "error", "wrong", "pruned"))
                continue
            final = [t for t in tiles if t["stage"] == "final"] or tiles
            best = min(final, key=seconds)
            assert float(texts[0].replace(",", "")) == pytest.approx(speed(best), rel=5e-3)
            assert f"{best['registers']} reg, {best['spills']} B spill" in texts[1]
            assert f"{best['occupancy']:.0%} occ" in texts[1]
            waves = float(re.search(r"([\d.]+) w$", texts[1])[1])
            assert waves == pytest.approx(best["waves"], rel=5e-3, abs=5e-3)


def test_heatmap_outlines_the_winner_alone(matmuls):
    figure = figures.heatmap(matmuls)
    for ax, w in zip((ax for ax in figure.axes if ax.patches), matmuls, strict=True):
        (outline,) = [p for p in ax.patches if not p.get_fill()]
        across = [int(t.get_text()) for t in ax.get_xticklabels()]
        down = [int(t.get_text()) for t in ax.get_yticklabels()]
        x, y = outline.get_x() + outline.get_width() / 2, outline.get_y() + outline.get_height() / 2
        tile = w.best["tile"]
        assert (across[round(x)], down[round(y)]) == (tile["BLOCK_N"], tile["BLOCK_M"])
        assert to_hex(outline.get_edgecolor()) == LIGHT.good.lower()


def test_heatmap_tells_apart_what_failed_was_pruned_and_not_tried():
    base = [r for r in perf_rows.workload(perf_rows.matmul(2048), count=36) if r["tile"]]
    changes = {
        (64, 64): dict(status="wrong", error=0.4), (64, 128): dict(status="error", reason="x"),
        (128, 64): dict(status="pruned", spills=64, reason="spills"), (128, 128): None,
        (256, 64): dict(status="skipped", reason="no time left"),
    }  # fmt: skip
    rows = []
    for row in base:
        at = (row["tile"]["BLOCK_M"], row["tile"]["BLOCK_N"])
        if at not in changes:
            rows.append(row)
        elif changes[at]:
            rows.append(row | {"median_s": None} | changes[at])
    figure = figures.heatmap(workloads(rows))
    found = cells(figure.axes[0])
    assert found[64, 64] == ["wrong"] and found[128, 64] == ["error"]
    assert found[64, 128] == ["spills\n64 B"]
    assert (128, 128) not in found and (64, 256) not in found
    hatches = {}
    for patch in figure.axes[0].patches:
        if patch.get_hatch():
            place = round(patch.get_x() + 0.48), round(patch.get_y() + 0.47)
            hatches[place] = patch.get_hatch()
    # Places count from 0: (BLOCK_N, BLOCK_M) of 64, 128, 256.
    assert hatches[0, 0] == hatches[1, 0] != hatches[0, 1]
    assert hatches[1, 1] == hatches[0, 2] != hatches[0, 1]
    assert len({hatches[0, 0], hatches[0, 1], hatches[1, 1]}) == 3
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"the winner", "wrong or error", "pruned, not timed", "not tried"} <= set(legend)


def test_heatmap_of_one_axis_is_a_strip(shown):
    figure = figures.heatmap([w for w in shown if w.op == "adamw"])
    (ax,) = figure.axes
    assert ax.get_xlabel() == "BLOCK_M" and ax.get_ylabel() == ""
    assert len(ax.get_yticks()) == 1 and len(ax.get_xticks()) == 6
    assert "GB/s" in page_title(figure)


def page_title(figure):
    return figure.texts[0].get_text()


def test_the_colour_is_the_share_of_the_best():
    assert figures._heat(1.0) == figures.HEAT(1.0)
    assert figures._heat(0.25) == figures._heat(0.1) == figures.HEAT(0.0)
    brightness = [sum(figures._heat(share)[:3]) for share in (0.3, 0.5, 0.7, 1.0)]
    assert brightness == sorted(brightness)


# -- the others ----------------------------------------------------------------------------------


def test_curves_over_sizes(matmuls):
    (ax,) = figures.curves(matmuls).axes
    assert ax.get_xscale() == "log" and ax.get_ylim()[0] == 0
    assert ax.get_xlabel() == "M = N = K" and ax.get_ylabel() == "TFLOP/s"
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["tilelab"].get_xdata()) == [512, 1024, 2048, 4096, 8192]
    np.testing.assert_allclose(lines["tilelab"].get_ydata(), [speed(w.best) for w in matmuls])
    peers = [next(p for p in w.peers if p["impl"] == "torch") for w in matmuls]
    np.testing.assert_allclose(lines["PyTorch"].get_ydata(), [speed(p) for p in peers])
    np.testing.assert_allclose(lines["ceiling"].get_ydata()[-2:], 989.4, rtol=1e-3)
    band = ax.collections[-1].get_paths()[0].vertices[:, 1]  # tilelab's, drawn last
    quartiles = [speed(w.best, w.best[f"{q}_s"]) for w in matmuls for q in ("q25", "q75")]
    assert min(band) == pytest.approx(min(quartiles)) and max(band) == pytest.approx(max(quartiles))


def test_curves_over_layers_keep_the_order_of_the_network(layers):
    figure = figures.curves(layers)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        name.removeprefix("resnet50.") for name, *_ in perf_rows.LAYERS
    ]
    assert all(line.get_linestyle() == "None" for line in ax.get_lines())  # no line joins layers
    assert len(ax.collections) == 4  # quartiles of three, and the ceilings


def test_curves_without_peers_or_a_known_gpu(matmuls):
    alone = [w._replace(peers=[], gpu="a new GPU") for w in matmuls]
    (ax,) = figures.curves(alone).axes
    assert [line.get_label() for line in ax.get_lines()] == ["tilelab"]


def test_one_size_that_varies_makes_an_axis():
    def sized(**shapes):
        names = zip(*shapes.values(), strict=True)
        one = perf_rows.workload(perf_rows.matmul(512), count=1)[0]
        return workloads(one | dict(shape=dict(zip(shapes, s, strict=True)), shape_name=str(s))
                         for s in names)  # fmt: skip

    assert figures.numeric_sizes(sized(M=(1, 2, 3), N=(5, 5, 5))) == ("M", [1, 2, 3])
    assert figures.numeric_sizes(sized(M=(1, 2, 3), N=(1, 2, 3))) == ("M = N", [1, 2, 3])
    assert figures.numeric_sizes(sized(M=(1, 2, 3), N=(1, 2, 4))) is None
    assert figures.numeric_sizes(sized(M=(1, 2), N=(5, 5))) is None


def test_roofline(shown):
    some = plot.pages("roofline", shown)[0].workloads
    (ax,) = figures.roofline(some).axes
    points = [
        (float(x[0]), float(y[0])) for line in ax.get_lines()
        if len(x := line.get_xdata()) == 1 and (y := line.get_ydata()) is not None
    ]  # fmt: skip
    for w in some:
        at = w.best["flops"] / w.best["bytes"], w.best["flops"] / seconds(w.best) / 1e12
        assert any(np.allclose(at, point) for point in points)
    roof = next(line for line in ax.get_lines() if len(line.get_xdata()) == 3)
    (x, ridge, _), (y, peak, flat) = roof.get_data()
    assert peak == flat == pytest.approx(989.4, rel=1e-3)
    assert y / x == pytest.approx(4.8) and ridge == pytest.approx(989.4 / 4.8, rel=1e-3)
    assert {"989 TFLOP/s (bf16)", "4.8 TB/s"} <= {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("measured", [True, False])
def test_a_ladder_has_the_fastest_tile_of_each_kernel(measured):
    rows = perf_rows.ladder(measured)
    other = perf_rows.workload(perf_rows.matmul(512), count=3, measured=measured)
    (page,) = plot.pages("ladder", workloads(rows + other))
    assert page.name == "ladder-conv2d-fwd-bfloat16-resnet50-n32" + "-predicted" * (not measured)
    figure = figures.ladder(page.workloads)
    (ax,) = figure.axes
    shown = page.workloads
    assert [t.get_text() for t in ax.get_yticklabels()] == [w.label for w in shown]
    assert len(shown) == 4 and len(ax.patches) == 4 * 4
    bars = sorted(ax.patches, key=lambda bar: bar.get_y())
    for w, of in zip(shown, zip(*[iter(bars)] * 4, strict=True), strict=True):
        for rung, bar in zip(("direct", "flat", "pointer", "tma"), of, strict=True):
            alike = [t for t in w.tiles if t["tile"].get("kernel", "pointer") == rung]
            assert bar.get_width() == pytest.approx(speed(min(alike, key=seconds)))
    texts = " ".join(written(figure))
    assert ("compiled, predicted, not measured" in texts) == (not measured)
    assert {"direct, no tensor cores", "implicit GEMM"} <= set(written(figure))
    (peak,) = ax.get_lines()
    assert peak.get_xdata()[0] == pytest.approx(989.4, rel=1e-3)
    words = alt_text(page)
    assert f"layer4.1.conv2 direct {bars[-4].get_width():.3g}" in words
    assert ("Predicted, not measured." in words) == (not measured)


def test_two_kernels_that_are_both_in_use_are_no_ladder():
    rows = [row for row in perf_rows.ladder() if row["tile"].get("kernel") in (None, "tma")]
    assert plot.pages("ladder", workloads(rows)) == []
    some = [row | {"gpu": "a new GPU"} for row in perf_rows.ladder()
            if row["tile"].get("kernel") in ("flat", "tma")]  # fmt: skip
    (ax,) = figures.ladder(workloads(some)).axes
    assert len(ax.patches) == 8 and not ax.get_lines()  # whose peak nobody knows


def test_predicted_against_measured():
    one = perf_rows.workload(perf_rows.matmul(512), count=1)[:1]
    assert one[0]["status"] == "ok"
    tile = one[0]["tile"]
    rows = [
        one[0] | dict(tile=tile | dict(GROUP_M=i), median_s=m, predicted_s=p)
        for i, (m, p) in enumerate([(1e-4, 1e-4), (1e-4, 0.9e-4), (1e-4, 1.3e-4), (2e-4, 1e-4)])
    ]
    figure = figures.predicted(workloads(rows))
    assert page_title(figure) == "Predicted against measured: median error 20% of 4 tiles"
    (ax,) = figure.axes
    points = next(line for line in ax.get_lines() if line.get_linestyle() == "None")
    np.testing.assert_allclose(points.get_xdata(), [100, 100, 100, 200])
    np.testing.assert_allclose(points.get_ydata(), [100, 90, 130, 100])
    low, high = ax.collections[0].get_paths()[0].get_extents().get_points()
    assert high[1] / high[0] == pytest.approx(1.25) and low[1] / low[0] == pytest.approx(0.75)


def test_forest_and_its_mean(layers):
    found = ranking.speedups(layers)
    for s in found:
        best, peer = s.workload.best, s.workload.best_peer
        ratios = np.divide(peer["samples_s"], best["samples_s"])
        assert s.ratio == pytest.approx(np.median(ratios)) and s.low <= s.ratio <= s.high
        assert peer["median_s"] == min(p["median_s"] for p in s.workload.peers)
    (ax,) = figures.forest(layers).axes
    (mean,) = [line for line in ax.get_lines() if line.get_marker() == "D"]
    assert mean.get_xdata()[0] == pytest.approx(stats.geomean([s.ratio for s in found]))
    assert ax.texts[-1].get_text() == f"{mean.get_xdata()[0]:.2f}x"
    assert ax.get_yticklabels()[-1].get_text() == "geometric mean"
    assert ax.get_xlim()[0] < 1 < ax.get_xlim()[1]


@pytest.mark.parametrize(
    "low, high, verdict",
    [(1.01, 1.1, "faster"), (0.9, 0.99, "slower"), (0.99, 1.01, "tie"), (None, None, "unpaired")],
)
def test_verdicts(low, high, verdict):
    assert ranking.Speedup(None, "torch", 1.0, low, high).verdict == verdict


def test_a_peer_of_another_race_has_no_interval(layers):
    apart = [w._replace(peers=[peer | {"race": "other"} for peer in w.peers]) for w in layers]
    assert {s.verdict for s in ranking.speedups(apart)} == {"unpaired"}
    assert "[" not in " ".join(t.get_text() for t in figures.forest(apart).axes[0].texts)


# -- pages and files -----------------------------------------------------------------------------


def test_pages_have_one_operator_and_six_panels_at_most(rows):
    every = workloads(rows + perf_rows.ladder())
    pages = [page for kind in plot.KINDS for page in plot.pages(kind, every)]
    names = [page.name for page in pages]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) for name in names)
    for page in pages:
        shown = page.workloads
        if page.kind not in ("roofline", "predicted"):
            assert len({(w.op, w.mode, w.dtype) for w in shown}) == 1
        assert page.kind != "heatmap" or len(shown) <= 6
    assert {page.kind for page in pages} == set(plot.KINDS)


def test_many_workloads_are_divided_evenly():
    rows = [
        row for size in range(1, 9)
        for row in perf_rows.workload(perf_rows.matmul(256 * size), count=3, measured=False)
    ]  # fmt: skip
    pages = plot.pages("heatmap", workloads(rows))
    assert [len(page.workloads) for page in pages] == [4, 4]
    assert [page.name[-2:] for page in pages] == ["-1", "-2"]


def test_two_gpus_are_two_figures(matmuls):
    other = changed(matmuls, gpu="AMD Instinct MI300X / 8")
    pages = plot.pages("forest", matmuls + other)
    assert len(pages) == 2 and "amd-instinct-mi300x-8" in pages[1].name


def test_save_writes_both_themes_whole(tmp_path):
    """Also of a large heat-map the files are small."""
    rows = [row for size in (64, 96, 128, 160, 192, 224)
            for row in perf_rows.workload(perf_rows.matmul(32 * size), count=72)]  # fmt: skip
    page = plot.pages("heatmap", workloads(rows))[0]._replace(name="name")
    paths = plot.save(page, tmp_path / "new", ("png", "svg"))
    assert sorted(p.name for p in paths) == [
        "name-dark.png", "name-dark.svg", "name-light.png", "name-light.svg",
    ]  # fmt: skip
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())  # no temporary file is left
    for path in paths:
        assert path.stat().st_size < 300_000
        theme = LIGHT if "light" in path.name else DARK
        if path.suffix == ".svg":
            root = xml.etree.ElementTree.fromstring(path.read_text())
            assert root.tag.endswith("svg") and theme.background in path.read_text()
            continue
        pixels = imread(io.BytesIO(path.read_bytes()))
        assert pixels.shape[1] == 1800
        np.testing.assert_allclose(pixels[0, 0, :3], to_rgb(theme.background), atol=0.02)


def test_an_svg_says_the_same_after_it_was_made_smaller(matmuls):
    svg = plot.render(plot.Page("curves", "", matmuls), LIGHT, "svg").decode()
    texts = "".join(xml.etree.ElementTree.fromstring(svg).itertext())
    for text in ("tilelab", "PyTorch", "TFLOP/s", "8192", "commit 0123abc+"):
        assert text in texts
    assert "font-family" in svg and "url(#" in svg
    for name in set(re.findall(r'url\(#(\w+)\)|href="#(\w+)"', svg)):
        assert f'id="{"".join(name)}"' in svg


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PerfError, match="cannot write .*file"):
        results.write_whole(tmp_path / "file" / "x.png", b"x")
    (tmp_path / "there").mkdir()
    with pytest.raises(PerfError, match="cannot write"):
        results.write_whole(tmp_path / "there", b"x")
    assert not list(tmp_path.glob(".*"))


def test_names_are_text_and_not_mathematics(matmuls):
    odd = "$\\frac{<b>&$ \\n"
    named = [w._replace(name=f"{odd} {w.shape['M']}") for w in matmuls[:2]]
    for kind in ("heatmap", "forest"):
        svg = plot.render(plot.Page(kind, "", named), LIGHT, "svg")
        assert "$\\frac{<b>&$" in "".join(xml.etree.ElementTree.fromstring(svg).itertext())


def test_drawing_changes_no_settings(matmuls):
    before = dict(rcParams)
    plot.render(plot.Page("curves", "", matmuls), DARK, "svg")
    assert dict(rcParams) == before


def run(*words):
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return plot.run(parser.parse_args([str(word) for word in words]))


def test_command_line(tmp_path, capsys):
    rows = perf_rows.workload(perf_rows.adamw(2**16), count=6)
    path = perf_rows.write(tmp_path / "r.jsonl", perf_rows.header(), *rows)
    assert run(path, "--out", tmp_path / "out", "--kind", "heatmap,curves,heatmap") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/")[-1] for line in out[:2]] == [
        "heatmap-adamw-step-float32-demo-light.png", "heatmap-adamw-step-float32-demo-dark.png",
    ]  # fmt: skip
    assert out[2] == "curves: nothing to show: no two shapes of one operator have a time"
    assert len(out) == 3 and len(list((tmp_path / "out").iterdir())) == 2
    for flags, message in (
        (["--kind", "heat"], "unknown kind heat: heatmap, curves"),
        (["--kind", ""], "unknown kind ''"),
        (["--format", "pdf"], "unknown format pdf: png, svg"),
        (["--kind", "curves"], "nothing to draw: no figure of curves has rows"),
    ):
        with pytest.raises(PerfError, match=re.escape(message)):
            run(path, "--out", tmp_path / "out", *flags)
    empty = perf_rows.write(tmp_path / "empty.jsonl", perf_rows.header())
    with pytest.raises(PerfError, match="not one row"):
        run(empty, "--out", tmp_path / "out")

"""`tilelab validate`: metrics of lists made by hand, its input, and the bars of the prediction.

The bars hold the committed model to public measurements of matmul on an A100 and an H100. If a
change of the model moves the numbers, `tilelab validate --update` writes them anew; the bars stay.
"""

import concurrent.futures
import gzip
import json
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from tests.tools import perf_rows
from tilelab.__main__ import main
from tilelab.kernels.matmul import matmul_kernel
from tilelab.perf.commands import validate
from tilelab.perf.compiler import aot, facts
from tilelab.perf.compiler.kernel_source import source_hash
from tilelab.perf.compiler.prediction import LAUNCH_S, predict
from tilelab.perf.errors import PerfError
from tilelab.perf.report import agreement as report
from tilelab.perf.report import figures
from tilelab.perf.rows import agreement, lists
from tilelab.perf.work import gpus

MS = 1e-3


def tile(m=128, n=64, k=32, warps=4, stages=3):
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)


def held(measured, predicted, library_s=None, tiles=None, label="A100", taken=None):
    """A list whose tiles differ in their stages; times are in ms."""
    tiles = tiles or [tile(stages=1 + i) for i in range(len(measured))]
    each = lists.TileList(
        label, gpus.GPUS["a100"], "matmul", "fwd", "float16", "ieee", dict(M=64, N=64, K=64), "x",
        "nn", tiles, [MS * t for t in measured], library_s, "events", None, "by hand",
    )  # fmt: skip
    arrays = MS * np.array(measured), MS * np.array(predicted), np.ones(len(measured))
    return agreement.Held(each, *arrays, np.arange(len(measured)) == taken)


# -- metrics -------------------------------------------------------------------------------------


def test_ranks_share_their_mean():
    np.testing.assert_array_equal(agreement.ranks([3, 1, 3, 2]), [3.5, 1, 3.5, 2])


def test_rank_correlation():
    assert agreement.spearman([1, 2, 3], [10, 20, 99]) == pytest.approx(1)
    assert agreement.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert agreement.spearman([1, 2, 3, 4], [2, 1, 9, 5]) == pytest.approx(0.6)
    # ranks 1 2 3 and 1.5 1.5 3: covariance 1.5, variances 2 and 1.5
    assert agreement.spearman([1, 2, 3], [5, 5, 6]) == pytest.approx(1.5 / np.sqrt(2 * 1.5))
    assert agreement.spearman([1, 2, 3], [7, 7, 7]) is None


def test_regret_is_that_of_the_predicted_tile():
    one = held([1.0, 1.2, 2.0], [9, 5, 7])  # the second tile is picked
    two = held([1.0, 3.0], [1, 2])  # the best tile is picked
    regret = agreement.regret_of([one, two], lambda each: each.picked)
    assert regret.mean == pytest.approx(0.1)
    assert [regret.share(x) for x in (0.1, 0.19, 0.21)] == [0.5, 0.5, 1]


def test_ties_are_drawn():
    tied = held([1.0, 1.2, 2.0], [5, 5.004, 5.02])  # the third is 0.4% slower: no tie
    np.testing.assert_array_equal(tied.picked, [True, True, False])
    regret = agreement.regret_of([tied, held([1, 9], [1, 2])], lambda each: each.picked)
    assert regret.mean == pytest.approx((0.1 + 0) / 2)
    assert regret.share(0.05) == pytest.approx(0.75)


def test_a_random_tile_and_the_one_best_tile():
    one, two = held([1.0, 1.1, 4.0], [1, 2, 3]), held([3.0, 1.5, 1.0], [1, 2, 3])
    fixed = agreement.fixed_tile([one, two])  # mean regrets: 1.0, 0.3, 1.5
    assert fixed == "128x64x32 w4 s2"
    found = agreement.regrets([one, two], fixed)
    assert found["fixed"].mean == pytest.approx((0.1 + 0.5) / 2)
    assert found["random"].mean == pytest.approx((3.1 / 3 + 2.5 / 3) / 2)
    assert found["random"].share(0.11) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["model"].mean == pytest.approx((0 + 2) / 2)


def test_the_tile_of_a_call_counts_where_it_was_measured():
    lists = [
        held([1.0, 1.3], [1, 2], taken=1),
        held([1.0, 1.3], [1, 2]),
        held([2, 1], [1, 2], taken=1),
    ]
    call = agreement.regrets(lists, None)["call"]
    assert call.mean == pytest.approx(0.15) and call.weights.sum() == 2
    assert agreement.order(lists, None)["regret_call"]["most"] == pytest.approx(0.3)


def test_a_tile_of_few_lists_is_not_the_fixed_one():
    rare = held([1.0, 2.0], [1, 2], tiles=[tile(k=128), tile(stages=2)])
    common = [held([1.5, 1.0, 2.0], [1, 2, 3]) for _ in range(10)]
    assert agreement.fixed_tile([rare, *common]) == "128x64x32 w4 s2"
    assert agreement.fixed_tile([rare, held([1, 2], [1, 2])]) == "128x64x32 w4 s2"
    none = [held([1, 2], [1, 2], tiles=[tile(k=16 << i), tile(k=16 << i, m=16)]) for i in (1, 2)]
    assert agreement.fixed_tile(none) is None
    found = agreement.summary(none)["A100"]
    assert found["fixed_tile"] is None and found["all"]["regret_fixed"] is None
    assert "–" in report.text(agreement.rounded({"A100": found}))


def test_level_and_speed_over_the_library():
    ratios = np.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21])
    found = agreement.level(ratios)
    assert found["within_20"] == 0.5 and found["median"] == pytest.approx(0.905)
    one = held([1.0, 2.0], [2, 1], library_s=1e-3)  # the second is picked: half as fast
    two = held([4.0, 1.0], [2, 1], library_s=2e-3)  # the best is picked: twice as fast
    without = held([1.0, 9.0], [1, 2])
    speeds = agreement.library([one, two, without], "128x64x32 w4 s1")
    assert speeds["lists"] == 2
    assert speeds["model"] == pytest.approx((0.5 * 2) ** 0.5)
    assert speeds["fixed"] == pytest.approx((1 * 0.5) ** 0.5)
    assert speeds["best"] == pytest.approx((1 * 2) ** 0.5)
    assert agreement.library([without], None) is None


def test_regimes_go_by_the_best_tile():
    names = [held([t, 50], [1, 2]).regime for t in (0.005, 0.01, 0.05, 0.5, 1.0)]
    assert names == [name for name, _ in agreement.REGIMES]
    found = agreement.summary([held([0.005, 50], [1, 2]), held([2, 3], [1, 2], label="H100")])
    assert list(found["A100"]["by_time"]) == ["under 10 µs"]
    assert list(found["H100"]["by_time"]) == ["over 1 ms"]


# -- what it reads -------------------------------------------------------------------------------

LINE = dict(
    gpu="a100", dtype="bfloat16", M=4096, N=480, K=240, layout="tn", cublas_ms=0.02,
    columns=["BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "ms"],
    tiles=[[128, 64, 32, 4, 3, 0.017], [64, 64, 16, 4, 2, 0.0182]], source="me",
)  # fmt: skip
CARD = dict(card="slow", gpu="a100", bandwidth=1e12, ceiling=0.5, why="a test")


def read(*lines):
    return lists.parse("mine.jsonl", "\n".join(map(json.dumps, lines)).encode())


def test_a_list():
    (each,) = read(LINE)
    assert (each.label, each.gpu, each.dtype, each.layout) == (
        "a100", gpus.GPUS["a100"], "bfloat16", "tn",
    )  # fmt: skip
    assert each.shape == dict(M=4096, N=480, K=240)
    assert each.tiles == [tile(), tile(64, 64, 16, 4, 2)]
    np.testing.assert_allclose(each.seconds, [17e-6, 18.2e-6])
    assert each.library_s == pytest.approx(20e-6) and each.timer == "events"
    columns = ["ms", "note", *LINE["columns"][:5]]  # in another order, and one more
    (other,) = read(LINE | dict(columns=columns, tiles=[[0.017, "x", 128, 64, 32, 4, 3]]))
    assert other.tiles == [tile()] and other.seconds == [pytest.approx(17e-6)]
    (tf32,) = read(LINE | dict(dtype="tf32", timer="graph"))
    assert (tf32.dtype, tf32.precision, tf32.timer) == ("float32", "tf32", "graph")


def test_a_card_of_its_own():
    plain, slow = read(LINE | dict(card="slow"), CARD, LINE)[::-1]
    assert slow.gpu == gpus.GPUS["a100"]._replace(bandwidth=1e12, ceiling=0.5)
    assert plain.gpu == gpus.GPUS["a100"]
    assert (plain.label, slow.label) == ("a100", "a100, slow")


@pytest.mark.parametrize(
    "lines, message",
    [
        ([LINE, "x"], "line 2: neither a list nor a card"),
        ([{**LINE, "gpu": "a10"}], "line 1: no peaks are known for 'a10'"),
        ([{k: v for k, v in LINE.items() if k != "gpu"}], "line 1: gpu is missing"),
        ([{k: v for k, v in LINE.items() if k != "tiles"}], "line 1: tiles is missing"),
        ([LINE | dict(columns=LINE["columns"][:5])], "line 1: columns lacks ms"),
        ([LINE | dict(tiles=[[1, 2]])], "line 1: a tile has not the 6 numbers"),
        ([LINE | dict(tiles=[[128, 64, 32, 4, 3, 0]])], "ms must be a positive number, got 0"),
        ([LINE | dict(tiles=[[128, 64, 32, 0, 3, 1]])], "num_warps must be a positive whole"),
        ([LINE | dict(tiles=2 * LINE["tiles"])], "the tile 128x64x32 w4 s3 is there twice"),
        ([LINE | dict(layout="mn")], "layout must be one of nn, nt, tn, tt; got 'mn'"),
        ([LINE | dict(dtype="fp16")], "dtype must be one of float16, .* got 'fp16'"),
        ([LINE | dict(timer="watch")], "timer must be one of events, graph"),
        ([LINE | dict(K="240")], "K must be int, got '240'"),
        ([LINE | dict(K=-1)], "K must be a positive whole number, got -1"),
        ([LINE | dict(cublas_ms=-1)], "cublas_ms must be a positive number"),
        ([LINE | dict(card="fast"), CARD], "no line says what is special about the card 'fast'"),
        ([CARD | dict(clock=1)], "line 1: a card has no field clock"),
        ([CARD | dict(ceiling="1")], "ceiling must be a positive number"),
    ],
)
def test_a_wrong_list_says_where(lines, message):
    with pytest.raises(PerfError, match=f"mine.jsonl, .*{message}"):
        read(*lines)


def test_one_error_from_the_command_line(tmp_path, capsys):
    def error(*words):
        assert main(["validate", *map(str, words)]) == 2
        out, text = capsys.readouterr()
        assert not out and text.count("\n") == 1
        return text

    assert "cannot read" in error(tmp_path / "none.jsonl")
    path = tmp_path / "lists.jsonl"
    path.write_text("tiles\n")
    assert "lists.jsonl, line 1: not a line of JSON" in error(path)
    path.write_text("")
    assert "no list of two measured tiles" in error(path)
    path.write_text(json.dumps(LINE | dict(tiles=LINE["tiles"][:1])))
    assert "no list of two measured tiles" in error(path)
    assert "--update is about the public benchmark" in error("--update", path)
    assert "lists.jsonl is not a folder" in error("--out", path)
    assert "--json: there is no folder" in error("--json", tmp_path / "no" / "s.json")
    header = perf_rows.header() | dict(gpu="NVIDIA A10")
    perf_rows.write(path, header, *perf_rows.workload(perf_rows.matmul(512), count=3))
    assert "nothing is known of the GPU 'NVIDIA A10'" in error(path)


# -- from lists to predictions -------------------------------------------------------------------

FACT = dict(
    registers=128, spills=0, shared=36864, threads=128, tensor_core="HMMA.16816.F32",
    loop_instructions=130, instructions=900, tensor_cores_in_loop=32, operands=None,
)  # fmt: skip


class FakeCompilers:
    """Compilers that know one answer."""

    def __init__(self, answer=None):
        self.answer, self.jobs = answer or (lambda w, tile, *_: FACT), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, what, *job):
        self.jobs.append(job)
        future = concurrent.futures.Future()
        future.set_result(self.answer(*job))
        return future


@pytest.fixture
def compilers(monkeypatch):
    fake = FakeCompilers()
    monkeypatch.setattr(aot, "Compilers", lambda workers: fake)
    return fake


def test_a_fact_is_compiled_once_for_many_sizes(compilers):
    same = [LINE, LINE | dict(M=8192, dtype="float16"), LINE | dict(K=272)]
    other = [LINE | dict(K=256), LINE | dict(N=481), LINE | dict(layout="tt")]
    known = facts.Facts()
    known.complete(read(*same, *other))
    # Of 240 and 272, BLOCK_K = 32 divides neither, and 16 both: for 256 only the first tile is new.
    assert len(known) == len(compilers.jobs) == 2 + 1 + 2 + 2
    for key in known:
        w = facts.typical(key)
        assert (w.shape["K"] % key.tile[2] == 0) == key.even_k
        assert "".join(n for n in "MNK" if w.shape[n] % 16 == 0) == key.divisible
    known.complete(read(*same, *other))
    assert len(compilers.jobs) == 7


def test_the_row_of_a_tile(compilers):
    (each,) = read(LINE)  # A is contiguous along M, and B along N
    known = facts.Facts()
    known.complete([each])
    row = known.row(each, each.tiles[0])
    assert row["programs"] == 32 * 8 and row["launches"] == 1
    assert row["moved"] == row["bytes"] == 2 * (4096 * 240 + 240 * 480 + 4096 * 480)
    assert (row["run_a"], row["run_b"]) == (2 * 128, 2 * 64)
    (rows,) = read(LINE | dict(layout="nt", K=16))  # both along K, which ends before BLOCK_K
    known.complete([rows])
    row = known.row(rows, rows.tiles[0])
    assert (row["run_a"], row["run_b"]) == (32, 32)


def test_a_timer_decides_what_a_launch_costs(compilers):
    by_events, by_graph = read(LINE, LINE | dict(timer="graph"))
    known = facts.Facts()
    pair = [by_events, by_graph]
    first, second = validate.hold(pair, validate.rows_of(pair, known))
    np.testing.assert_allclose(first.predicted - second.predicted, 5e-6 - LAUNCH_S)
    row = known.row(by_graph, by_graph.tiles[0])
    assert second.predicted[0] == predict(row, gpus.GPUS["a100"])["predicted_s"]


def test_what_cannot_be_predicted_is_noted(compilers):
    compilers.answer = lambda w, tile, *_: (
        FACT | dict(failed="does not compile: odd") if tile["num_stages"] == 9 else FACT
    )
    found = read(LINE | dict(tiles=[*LINE["tiles"], [128, 64, 32, 4, 9, 0.02]]))
    notes = []
    (each,) = validate.hold(found, validate.rows_of(found, facts.Facts()), notes.append)
    assert len(each.measured) == len(each.list.tiles) == 2
    assert notes == ["left out 1 tiles, the first because it does not compile: odd"]
    compilers.answer = lambda *_: FACT | dict(shared=10**6)
    with pytest.raises(PerfError, match="no list has two tiles that can be predicted"):
        validate.hold(found, validate.rows_of(found, facts.Facts()), notes.append)
    assert "left out 3 tiles, the first because it does not fit" in notes[-1]


def test_a_results_file(compilers, tmp_path, capsys):
    """Tiles that were measured are compiled as a sweep does it, in their own mode."""
    header = perf_rows.header() | dict(gpu="NVIDIA H200")
    problem = perf_rows.matmul(1024)
    path = perf_rows.write(tmp_path / "r.jsonl", header, *perf_rows.workload(problem, count=6))
    compilers.answer = lambda w, tile, *_: (
        FACT | dict(tile_op="matmul", sizes=w.shape, launches=1, moved=w.bytes, programs=64)
    )
    assert main(["validate", str(path), "--out", str(tmp_path), "--json", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"NVIDIA H200 +1 +\d", out) and "over the vendor's library in 1 lists" in out
    assert "1 lists were measured with older kernels" in out
    summary = json.loads((tmp_path / "s").read_text())
    (each,) = lists.read([path])
    assert summary["NVIDIA H200"]["all"]["tiles"] == len(each.tiles) == len(compilers.jobs) > 1
    assert {job[0].mode for job in compilers.jobs} == {"fwd"}
    assert {job[2] for job in compilers.jobs} == {"sm_90"}
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_facts_are_read_as_they_were_written(tmp_path, compilers):
    known = facts.Facts()
    known.complete(read(LINE))
    facts.write(tmp_path / "f.gz", known)
    first = (tmp_path / "f.gz").read_bytes()
    assert facts.read(tmp_path / "f.gz") == (facts.today(), known)
    facts.write(tmp_path / "f.gz", facts.Facts(reversed(known.items())))
    assert (tmp_path / "f.gz").read_bytes() == first
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"[]\n"))
    with pytest.raises(PerfError, match="is not a file of compiled facts"):
        facts.read(tmp_path / "f.gz")


@pytest.mark.parametrize("layout", lists.LAYOUTS)
def test_operands_lie_as_the_layout_says(layout):
    w = facts.typical(facts.Key("sm_80", "float16", "ieee", layout, "MNK", True, ()))
    launch = aot.trace(w, facts.GROUP | tile(), "sm_90", layout=layout).main
    assert launch.kernel is matmul_kernel and launch.meta["BLOCK_N"] == 64
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    assert (given["stride_ak"] == 1) == (layout[0] == "n")
    assert (given["stride_bn"] == 1) == (layout[1] == "n")
    assert not launch.meta["IN_PARTS"]


# -- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", report.DRAWN.values())
@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK], ids=lambda theme: theme.name)
def test_figures_can_be_read(draw, theme, benchmark):
    with figures.style(theme):
        figure = draw(benchmark, validate.note(benchmark), theme)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    for text in texts:
        assert text.get_fontsize() >= 7
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text
    words = " ".join(t.get_text() for t in texts)
    for fact in ("A100", "H100", "116 lists, 3,364 tiles", "AlnisM/autoheuristic-datasets@3ed2bc4"):
        assert fact in words


def test_the_regret_curve_is_the_share_of_lists():
    two = [held([1.0, 1.2], [2, 1]), held([1.0, 3.0], [1, 2])]  # regrets 20% and 0
    (ax,) = report.curves(two, "").axes
    line = next(line for line in ax.get_lines() if line.get_label() == "the predicted tile")
    x, y = line.get_data()
    assert y[np.searchsorted(x, 19.9, "right") - 1] == 50
    assert y[np.searchsorted(x, 20.1, "right") - 1] == 100


# -- the public benchmark ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    """The public lists, predicted from the committed facts, whatever triton is installed."""
    found = lists.read([validate.BENCHMARK])
    _, known = facts.read(validate.FACTS)
    rows = [[known.row(each, t) for t in each.tiles] for each in found]
    return validate.hold(found, rows, pytest.fail)


@pytest.fixture(scope="module")
def summary(benchmark):
    return agreement.rounded(agreement.summary(benchmark))


def test_the_benchmark_is_whole(benchmark):
    sizes = {label: len(mine) for label, mine in agreement.by_label(benchmark).items()}
    assert sizes == {"A100": 59, "H100": 57}
    assert sum(len(each.measured) for each in benchmark) == 3364


def test_the_committed_facts_are_of_this_kernel():
    header, _ = facts.read(validate.FACTS)
    assert header["kernel"] == source_hash(matmul_kernel), "run: tilelab validate --update"


def test_the_committed_summary_is_of_this_model(summary):
    committed = json.loads(validate.SUMMARY.read_text())
    changed = differences(summary, committed)
    assert not changed, "look at what changed, then run: tilelab validate --update"


def differences(new, old, name=""):
    """What differs by more than the last digit, which may be rounded either way."""
    if isinstance(new, dict) and isinstance(old, dict):
        pairs = {key: (new.get(key), old.get(key)) for key in new | old}
        return [d for key, pair in pairs.items() for d in differences(*pair, f"{name} {key}")]
    numbers = isinstance(new, float) and isinstance(old, float)
    same = abs(new - old) < 1.1e-3 if numbers else new == old
    return [] if same else [f"{name}: {old} -> {new}"]


@pytest.mark.parametrize("label", ["A100", "H100"])
def test_the_prediction_holds(label, summary):
    """What nobody may make worse: the level, the spread, the order of tiles, and the choice."""
    found = summary[label]["all"]
    assert 0.9 <= found["median"] <= 1.1
    assert found["within_20"] >= 0.85
    assert found["rank_correlation"] >= 0.95
    assert found["regret_model"]["mean"] <= 0.04
    assert found["regret_call"]["mean"] <= 0.04 and found["regret_call"]["lists"] >= 25

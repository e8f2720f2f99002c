"""perf/report/history.py: what remains of results files, a line for each set of shapes."""

import json
import os

import pytest

from tests.tools import perf_rows
from tilelab import __main__ as main
from tilelab.perf.errors import PerfError
from tilelab.perf.report import history
from tilelab.perf.rows import ranking, results, stats


def squares(sizes=(512, 1024, 2048), measured=True):
    return [
        row
        for seed, size in enumerate(sizes)
        for row in perf_rows.workload(perf_rows.matmul(size), seed, 12, measured)
    ]


def file(folder, rows, name="r.jsonl", measured=True, **header):
    return perf_rows.write(folder / name, perf_rows.header(measured) | header, *rows)


def entries(path):
    return history.entries(*ranking.read([path]))


def entry(path):
    (found,) = entries(path)
    return found


def test_an_entry_is_the_geometric_means_of_a_set(tmp_path):
    rows = squares()
    found = entry(file(tmp_path, rows))
    assert list(found) == list(history.FIELDS)
    about = {name: found[name] for name in ("gpu", "commit", "op", "mode", "dtype", "shapes")}
    assert about == dict(gpu=perf_rows.GPU, commit="0123456+", op="matmul", mode="fwd",
                         dtype="bfloat16", shapes="square")  # fmt: skip
    best, peers, predicted = [], [], []
    for size in (512, 1024, 2048):  # by hand, from the rows
        finals = [r for r in rows if r["shape"]["M"] == size and r["stage"] == "final"]
        ours = min((r for r in finals if r["impl"] == "tilelab"), key=lambda r: r["median_s"])
        peer = min((r for r in finals if r["impl"] != "tilelab"), key=lambda r: r["median_s"])
        best.append(ours["flops"] / ours["median_s"] / 1e12)
        predicted.append(ours["predicted_tflops"])
        peers.append(stats.paired_ratio(peer["samples_s"], ours["samples_s"])[0])
    over = [b / p for b, p in zip(best, predicted, strict=True)]
    for name, values in dict(measured=best, predicted=predicted, ratio=peers,
                             measured_over_predicted=over).items():  # fmt: skip
        assert found[name] == pytest.approx(stats.geomean(values), rel=1e-5), name
    assert found["worst"] == pytest.approx(min(peers), rel=1e-5)
    assert found["worst_shape"] == f"square {(512, 1024, 2048)[peers.index(min(peers))]}"
    assert (found["count"], found["compared"], found["failed"]) == (3, 3, 0)
    assert found["unit"] == "TFLOP/s" and found["versions"] == dict(torch="2.13.0", triton="3.9.0")


def test_what_was_not_measured_is_null(tmp_path):
    found = entry(file(tmp_path, squares(measured=False), measured=False))
    assert found["gpu"] == perf_rows.COMPILED and found["predicted"] > 0
    for name in ("measured", "measured_over_predicted", "ratio", "worst", "worst_shape"):
        assert found[name] is None, name
    assert found["compared"] == found["failed"] == 0
    cells = history.markdown([found]).splitlines()[-1].split(" | ")
    assert cells[6:10] == ["–"] * 4 and "TFLOP/s" in cells[5]


def test_without_peers_there_is_no_ratio(tmp_path):
    found = entry(file(tmp_path, [r for r in squares() if r["impl"] == "tilelab"]))
    assert found["measured"] > 0 and found["ratio"] is None and found["compared"] == 0


def test_a_shape_without_a_right_result_is_counted(tmp_path):
    """The peers have a time there, and it must not vanish from the log."""
    wrong = dict(status="wrong", median_s=None, samples_s=None, predicted_s=None)
    rows = [
        row | wrong if row["impl"] == "tilelab" and row["shape"]["M"] == 1024 else row
        for row in squares()
    ]
    found = entry(file(tmp_path, rows))
    assert (found["count"], found["compared"], found["failed"]) == (3, 2, 1)
    alone = [row for row in rows if row["impl"] == "tilelab" and row["shape"]["M"] == 1024]
    found = entry(file(tmp_path, alone, "alone.jsonl"))
    assert found["failed"] == found["count"] == 1 and found["measured"] is None
    assert history.markdown([found]).splitlines()[-1].split(" | ")[10] == "1"


def test_a_losing_set_is_shown_as_plainly_as_a_winning_one(tmp_path):
    softmax = perf_rows.workload(perf_rows.softmax(4096, 1000), 1, 12)
    table = history.markdown(entries(file(tmp_path, [*squares(), *softmax])))
    lost, won = (line.split(" | ") for line in table.splitlines()[2:])
    assert float(lost[8].removesuffix("x")) < 1 < float(won[8].removesuffix("x"))
    assert [type(float(cell.split("x")[0])) for cell in (lost[9], won[9])] == [float, float]


def test_sets_and_precisions_are_apart(tmp_path):
    tf32 = perf_rows.matmul(1024)._replace(dtype="float32", precision="tf32")
    rows = [*squares(), *perf_rows.workload(tf32, 5, 12)]

    for name, *layer in perf_rows.LAYERS[:2]:
        rows += perf_rows.workload(perf_rows.conv(name, 32, *layer), 7, 12)
    found = entries(file(tmp_path, rows))
    assert [(e["op"], e["dtype"], e["shapes"], e["count"]) for e in found] == [
        ("matmul", "bfloat16", "square", 3),
        ("matmul", "tf32", "square", 1),
        ("conv2d", "bfloat16", "resnet50 n32", 2),
    ]


def test_hot_and_cold_are_one_shape(tmp_path):
    hot = [row | {"cache": "hot"} for row in squares((512,)) if row["stage"] != "compile"]
    cold = squares((512,))
    (w,) = history.distinct_work([*hot, *cold])
    assert w.cache == "cold"
    (w,) = history.distinct_work(hot + [row for row in cold if row["stage"] == "compile"])
    assert w.cache == "hot"


def test_the_same_entry_is_added_once(tmp_path):
    path = file(tmp_path, squares())
    to = tmp_path / "deep" / "log.jsonl"
    assert history.append(to, entries(path)) == 1
    before = to.read_bytes()
    assert history.append(to, entries(path)) == 0 and to.read_bytes() == before
    later = [row | {"time": "2001-01-01T00:00:00+00:00"} for row in squares()]
    assert history.append(to, entries(file(tmp_path, later, "later.jsonl"))) == 0
    other = file(tmp_path, squares(), "other.jsonl", commit="f" * 40, dirty=False)
    assert history.append(to, [*entries(path), *entries(other), *entries(other)]) == 1
    noted = file(tmp_path, squares(), "noted.jsonl", note="with the tuned table")
    assert history.append(to, entries(noted)) == 1
    fewer = file(tmp_path, squares((512,)), "fewer.jsonl")  # other numbers of a known key
    assert history.append(to, entries(fewer)) == 1
    assert to.read_bytes().startswith(before)
    assert [e["commit"] for e in history.read(to)] == ["0123456+", "f" * 7, "0123456+", "0123456+"]


def test_an_interrupted_append_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    to = tmp_path / "log.jsonl"
    history.append(to, entries(file(tmp_path, squares((512,)))))
    before = to.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        history.append(to, entries(file(tmp_path, squares((1024,)), "b.jsonl")))
    beside = {path.name for path in tmp_path.iterdir()} - {".log.jsonl.lock"}
    assert to.read_bytes() == before and beside == {"log.jsonl", "r.jsonl", "b.jsonl"}


@pytest.mark.parametrize("line", ["{", "[]", '{"gpu": "x"}'])
def test_a_damaged_log_is_an_error_and_is_kept(tmp_path, line):
    to = tmp_path / "log.jsonl"
    history.append(to, entries(file(tmp_path, squares((512,)))))
    to.write_text(to.read_text() + line + "\n")
    before = to.read_bytes()
    with pytest.raises(PerfError, match="log.jsonl, line 2: damaged"):
        history.append(to, [])
    assert to.read_bytes() == before


def test_the_command(tmp_path, capsys):
    path, to = file(tmp_path, squares()), tmp_path / "log.jsonl"
    other = file(tmp_path, squares((512,)), "b.jsonl", commit="a" * 40, dirty=False)
    assert main.main(["log", str(path), str(other)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("| GPU | commit |") and "aaaaaaa" in table and not to.exists()
    assert main.main(["log", str(path), str(other), "--to", str(to)]) == 0
    assert "2 added, 0 of 2 known" in capsys.readouterr().out
    assert main.main(["log", str(path), "--to", str(to)]) == 0
    assert "0 added, 1 of 1 known" in capsys.readouterr().out
    assert [json.loads(line)["commit"] for line in to.read_text().splitlines()] == [
        "0123456+",
        "aaaaaaa",
    ]


def test_each_file_has_its_own_commit(tmp_path):
    """Read one by one or together, an entry has the commit of its newest row."""
    names = {}
    for commit in "ab":
        path = file(tmp_path, squares((512,)), f"{commit}.jsonl", commit=commit * 40, dirty=False)
        names[commit] = entry(path)["commit"]
    assert names == {"a": "aaaaaaa", "b": "bbbbbbb"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["log"], "the following arguments are required: FILE"),
        (["log", "missing.jsonl"], "cannot read missing.jsonl"),
        (["log", "pruned.jsonl"], "nothing to log"),
        (["log", "r.jsonl", "--to", "folder"], "cannot read folder"),
    ],
)
def test_wrong_input_gets_one_clear_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file(tmp_path, squares((512,)))
    pruned = [row | {"status": "skipped", "predicted_s": None} for row in squares(measured=False)]
    file(tmp_path, pruned, "pruned.jsonl", measured=False)
    (tmp_path / "folder").mkdir()
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_the_units_of_what_memory_limits(tmp_path):
    found = entry(file(tmp_path, perf_rows.workload(perf_rows.adamw(2**20), 3, 12)))
    assert found["unit"] == "GB/s" and found["shapes"] == "demo"
    (w,) = ranking.workloads(results.read(tmp_path / "r.jsonl").rows)
    assert found["measured"] == pytest.approx(w.best["gbps"], rel=1e-4)

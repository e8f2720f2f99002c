"""Results files: they survive kills, they are checked, and stale rows stay out."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tools.perf_rows import HEADER
from tests.tools.perf_rows import one_row as row
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results

ROOT = Path(__file__).parents[2]


def written(path, *rows, **header):
    with results.Writer(path, {**HEADER, **header}, note=fail) as writer:
        for each in rows:
            writer.write(each)
    return path


def fail(text):
    raise AssertionError(f"an unexpected note: {text}")


def read(*paths):
    """What files hold, and what was said about it."""
    notes = []
    return results.read(*paths, note=notes.append), notes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "results.jsonl"  # in a folder that has to be made


def test_rows_come_back_with_what_their_header_says(path):
    written(path, row(), row(mode="dgrad", samples_s=[1.0, 2], noisy=False))
    found, notes = read(path)
    assert not notes and len(found.headers) == 1 and found.headers[0]["schema"] == 1
    first, second = found.rows
    assert first == row(kind="row", gpu="NVIDIA H200", measured=True, commit="")
    assert second["samples_s"] == [1.0, 2] and second["noisy"] is False
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and all(line.startswith('{"kind": "') for line in lines)


def test_every_start_writes_a_header_and_keeps_the_rows(path):
    written(path, row())
    written(path, row(mode="dgrad"), commit="later")
    found, _ = read(path)
    assert [header.get("commit") for header in found.headers] == [None, "later"]
    assert [r["commit"] for r in found.rows] == ["", "later"]  # each of its own header
    assert [each["mode"] for each in found.rows] == ["fwd", "dgrad"]


def test_a_row_is_on_the_disk_when_write_returns(path):
    with results.Writer(path, HEADER) as writer:
        writer.write(row())
        assert len(read(path)[0].rows) == 1


# The child says the number of each row after write has returned.
CHILD = """
import json, sys
from tilelab.perf.rows.results import Writer
path, (header, row, start) = sys.argv[1], map(json.loads, sys.argv[2:])
with Writer(path, header, note=lambda text: print("note", text, file=sys.stderr)) as writer:
    for number in range(start, 10**9):
        row.update(shape={"M": number}, samples_s=[1.5] * 60_000)
        writer.write(row)
        print(number, flush=True)
"""


def test_kill_9_in_the_middle_of_writing_loses_one_row_at_most(path):
    """Real processes, killed while they write rows of 300 kB in a tight loop, and resumed."""
    start, torn = 0, 0
    for attempt in range(4):
        command = [sys.executable, "-c", CHILD, path, *map(json.dumps, (HEADER, row(), start))]
        child = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        child.stdout.readline()  # it is in the loop
        time.sleep(0.05 + 0.013 * attempt)
        child.send_signal(signal.SIGKILL)
        rest, errors = child.communicate()
        assert child.returncode == -signal.SIGKILL and b"Error" not in errors
        assert errors.startswith(b"note") == bool(torn), errors  # what the last kill has left
        finished = [int(text) for text in rest.split(b"\n")[:-1]]
        found, notes = read(path)
        numbers = [each["shape"]["M"] for each in found.rows]
        assert numbers == list(range(len(numbers)))  # none is missing, none is twice
        assert len(numbers) - 1 - max(finished, default=start) in (0, 1)
        assert all(len(each["samples_s"]) == 60_000 for each in found.rows)
        start, torn = len(numbers), len(notes)
    assert len(found.headers) == 4


def test_a_file_cut_off_anywhere_can_be_read_and_resumed(path, tmp_path):
    """Whole lines are kept and the torn one is named, wherever the file ends: near a line feed
    and elsewhere.
    """
    whole = written(path, row(), row(mode="dgrad", reason="ä")).read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    near = {end + i for end in ends for i in range(-3, 4)}
    for size in sorted((near | {*range(0, len(whole), 23)}) & {*range(len(whole) + 1)}):
        lines, torn = sum(size >= end for end in ends[1:]), size not in ends
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(whole[:size])
        found, notes = read(cut)
        assert (len(found.headers) + len(found.rows), len(notes)) == (lines, torn), size
        notes = []
        with results.Writer(cut, HEADER, notes.append) as writer:
            assert len(writer.rows) == max(0, lines - 1) and len(notes) == torn
            writer.write(row(mode="wgrad"))
        found, notes = read(cut)
        assert len(found.rows) == max(0, lines - 1) + 1 and not notes
        assert found.rows[-1]["mode"] == "wgrad"


def test_a_disk_that_is_full_leaves_no_half_line(path, monkeypatch):
    write, room = os.write, 40

    def fill(file, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= (taken := write(file, data[:room]))
        return taken

    with results.Writer(path, HEADER) as writer:
        writer.write(row())
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", fill)
        with pytest.raises(PerfError, match="cannot write .*: No space left on device"):
            writer.write(row(mode="dgrad"))
        assert room == 0 and path.read_bytes() == before
        monkeypatch.undo()
        writer.write(row(mode="wgrad"))
    assert [each["mode"] for each in read(path)[0].rows] == ["fwd", "wgrad"]


@pytest.mark.parametrize(
    "damage", [b"{", b"", b"[]", b'{"kind": "row"', b"\0\0\0", b"7", b'{"op": "matmul"}', b"\xff"]
)
def test_damage_before_the_end_is_an_error_with_its_place(path, damage):
    written(path, row(), row(mode="dgrad"))
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    for use in (results.read, lambda path: results.Writer(path, HEADER)):
        with pytest.raises(PerfError, match="results.jsonl, line 2: damaged"):
            use(path)
    assert path.read_bytes() == b"\n".join(lines)  # nothing was cut off or added


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b'{"run": "make"}\n', b'{"run": "make"}', b"\n", b'{"a']
)
def test_other_files_are_neither_read_nor_touched(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    for use in (results.read, lambda path: results.Writer(path, HEADER)):
        with pytest.raises(PerfError, match="not a results file|damaged"):
            use(path)
    assert path.read_bytes() == content


def test_rows_before_any_header_are_refused(path):
    written(path, row())
    path.write_bytes(path.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(PerfError, match="line 1: not a results file"):
        results.read(path)


def test_another_schema_is_refused_by_its_number(path):
    written(path, row())
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(PerfError, match="line 1: schema 2, but .* knows schema 1"):
        results.read(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(PerfError, match="cannot read .*nothing.jsonl: No such file"):
        results.read(tmp_path / "nothing.jsonl")
    with pytest.raises(PerfError, match="Is a directory"):
        results.Writer(tmp_path, HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(PerfError, match="cannot write"):
        results.Writer(tmp_path / "file" / "results.jsonl", HEADER)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"gpu": "NVIDIA A100"}, "gpu 'NVIDIA H200', this is 'NVIDIA A100'"),
        ({"measured": False}, "measured True, this is False"),
        ({"driver": "580.2"}, "driver '570.1', this is '580.2'"),
        ({"versions": {"torch": "2.14.0", "triton": "3.7.1"}}, "versions.torch '2.13.0'"),
        ({"versions": {"torch": "2.13.0", "triton": "3.8.0"}}, "versions.triton '3.7.1'"),
    ],
)
def test_another_machine_or_compiler_does_not_resume(path, change, name):
    before = written(path, row()).read_bytes()
    with pytest.raises(PerfError, match=name):
        results.Writer(path, {**HEADER, **change})
    assert path.read_bytes() == before


def test_what_may_differ_on_resume(path):
    written(path, row())
    written(path, seed=7, commit="b", dirty=True, clocks_mhz={"sm": 1980, "sm_max": None})
    with results.Writer(path, {**HEADER, "versions": {**HEADER["versions"], "numpy": "2"}}):
        pass
    assert len(read(path)[0].headers) == 3


def test_two_processes_do_not_write_to_one_file(path):
    with results.Writer(path, HEADER):
        with pytest.raises(PerfError, match="another process is writing"):
            results.Writer(path, HEADER)
    results.Writer(path, HEADER).close()


def test_find_knows_what_was_tried_before(path):
    tried = row(tile={"num_warps": 4, "BLOCK_M": 64})  # the order of keys does not matter
    written(path, row(median_s=1.0), row(median_s=2.0), row(source="bbbb", median_s=3.0))
    with results.Writer(path, HEADER) as writer:
        assert writer.find(tried)["median_s"] == 3.0
        assert writer.find(tried, source="aaaa")["median_s"] == 2.0  # the last one counts
        assert writer.find(tried, source="cccc") is None
        assert writer.find(row(stage="screen")) is None
        assert len(writer.rows) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"op": "conv2d"},
        {"mode": "dgrad"},
        {"dtype": "float16"},
        {"precision": "tf32"},
        {"shape": {"M": 64, "N": 32, "K": 17}},
        {"impl": "torch"},
        {"tile": {"BLOCK_M": 64, "num_warps": 8}},
        {"tile": None},
        {"stage": "screen"},
        {"cache": "hot"},
    ],
)
def test_key_tells_attempts_apart(change):
    assert results.key(row()) != results.key(row(**change))
    assert (results.workload(row()) != results.workload(row(**change))) == (
        next(iter(change)) in ("op", "mode", "dtype", "precision", "shape")
    )


def test_key_does_not_know_results():
    assert results.key(row()) == results.key(row(median_s=2.0, status="wrong", cache="cold"))
    hash(results.key(row()))


def test_the_last_row_of_a_key_counts(path):
    written(path, row(median_s=1.0), row(mode="dgrad"), row(median_s=2.0))
    found, notes = read(path)
    assert [(each["mode"], each["median_s"]) for each in found.rows] == [
        ("dgrad", 1e-3),
        ("fwd", 2.0),
    ]
    assert not notes


def test_rows_of_older_kernels_are_left_out_and_counted(path):
    written(
        path,
        row(source="aaaa"),
        row(source="aaaa", tile={"BLOCK_M": 32}),
        row(source="aaaa", mode="dgrad"),  # dgrad has no newer one
        row(impl="torch", tile=None, source=None),
        row(source="bbbb"),
    )
    found, notes = read(path)
    assert [(each["mode"], each["source"]) for each in found.rows] == [
        ("dgrad", "aaaa"),
        ("fwd", None),
        ("fwd", "bbbb"),
    ]
    assert len(notes) == 1 and notes[0].endswith("rows of older kernel sources (matmul fwd: 2)")


def test_a_source_that_came_back_is_the_newest(path):
    """a, b, a again: the kernel was changed, and changed back."""
    written(path, row(source="aaaa"), row(source="bbbb"), row(source="aaaa", median_s=5.0))
    found, _ = read(path)
    assert [each["median_s"] for each in found.rows] == [5.0]


def test_several_files_are_put_in_order_by_time(tmp_path):
    late = written(tmp_path / "late", row(source="bbbb", time="2026-02-01T00:00:00Z"))
    early = written(tmp_path / "early", row(source="aaaa", time="2026-01-01T00:00:00Z"))
    other = written(tmp_path / "other", row(source="aaaa"), gpu="NVIDIA A100")
    found, notes = read(late, early, other)
    assert {(each["gpu"], each["source"]) for each in found.rows} == {
        ("NVIDIA H200", "bbbb"),
        ("NVIDIA A100", "aaaa"),  # another GPU's are no older ones
    }
    assert len(notes) == 1 and len(found.headers) == 3


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"op": None}, "op is missing"),
        ({"status": "fine"}, "status must be ok or wrong or .* got 'fine'"),
        ({"mode": 3}, "mode must be fwd or"),
        ({"flops": 1.5}, "flops must be int, got 1.5"),
        ({"flops": True}, "flops must be int, got True"),
        ({"noisy": 1}, "noisy must be bool"),
        ({"median_s": "1"}, "median_s must be float, got '1'"),
        ({"samples_s": [1.0, "2"]}, "samples_s must be .float."),
        ({"shape": {"M": 1.5}}, "shape must be"),
        ({"tile": {"BLOCK_M": [1]}}, "tile must be"),
        ({"loop_mix": [1]}, "loop_mix must be"),
    ],
)
def test_types_are_checked_when_written_and_when_read(path, change, problem):
    with results.Writer(path, HEADER) as writer:
        with pytest.raises(PerfError, match=problem):
            writer.write(row(**change))
        writer.write(row())
    assert len(read(path)[0].rows) == 1  # the refused one left nothing
    with open(path, "a") as file:
        file.write(json.dumps(row(kind="row", **change)) + "\n")
    with pytest.raises(PerfError, match=f"line 3: damaged: {problem}"):
        results.read(path)


def test_unknown_fields_are_refused_when_written_and_kept_when_read(path):
    with results.Writer(path, HEADER) as writer, pytest.raises(PerfError, match="field.*: speed"):
        writer.write(row(speed=1))
    with pytest.raises(PerfError, match="field.*: hosts"):
        results.Writer(path, {**HEADER, "hosts": {}})
    with open(path, "a") as file:
        file.write(json.dumps(row(kind="row", speed=1)) + "\n")
    assert read(path)[0].rows[0]["speed"] == 1


def test_rows_that_were_read_can_be_written_again(path, tmp_path):
    written(path, row())
    (found,) = read(path)[0].rows
    other = written(tmp_path / "other", found)
    assert read(other)[0].rows == [found]
    assert '"gpu"' not in other.read_text().splitlines()[1]


def test_numbers_of_numpy_and_numbers_that_are_none(path):
    written(
        path,
        row(flops=np.int64(7), error=float("nan"), samples_s=(np.float64(0.5), np.float32(2))),
        row(mode="dgrad", error=float("inf"), noisy=np.bool_(True)),
    )
    first, second = read(path)[0].rows
    assert (first["flops"], first["error"], first["samples_s"]) == (7, None, [0.5, 2.0])
    assert second["error"] is None and second["noisy"] is True
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_what_is_no_data_is_refused(path):
    with results.Writer(path, HEADER) as writer, pytest.raises(PerfError, match="plain data"):
        writer.write(row(reason=object()))


@pytest.mark.parametrize("fields", [results.HEADER, results.ROW])
def test_the_documentation_prints_the_tables(fields):
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for name, field in list(fields.items())[1:]:  # all but "kind"
        kinds = [field.type] if isinstance(field.type, str) else field.type
        kind = ", ".join(f"`{kind}`" for kind in kinds) + ("" if field.required else " or null")
        assert field.meaning
        lines.append(f"| `{name}` | {kind} | {field.meaning} |")
    table = "\n".join(lines)
    assert table in (ROOT / "perf" / "README.md").read_text(), table


@pytest.mark.parametrize("command", ["plot", "html_page", "history", "compare"])
def test_reading_needs_neither_torch_nor_triton(command):
    """Of each command that reads results files: torch would make its user wait for seconds."""
    command = f"import sys, tilelab.perf.report.{command}\n"
    command += "assert not {'torch', 'triton', 'tilelab.kernels', 'tilelab.nets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_packed_files_are_read_as_they_are(path, tmp_path):
    packed = tmp_path / "results.jsonl.gz"
    packed.write_bytes(gzip.compress(written(path, row(), row(mode="dgrad")).read_bytes()))
    assert read(packed)[0].rows == read(path)[0].rows
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(PerfError, match="cannot read .*results.jsonl.gz"):
        read(packed)

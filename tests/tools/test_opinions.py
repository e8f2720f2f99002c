"""The tables of docs/verification.md; tests/perf/test_tables.py holds the page to them."""

import json
from collections import Counter

import pytest

from tests.tools import opinions

ROWS = json.loads(opinions.OPINIONS.read_text())["opinions"]


def test_ttsem_was_asked_about_every_kernel():
    """Or a kernel has come since: ask again."""
    asked = {row["kernel"] for row in ROWS if row["tool"] == "ttsem"}
    assert asked == set(opinions.compiled_launches(opinions.FACTS))


def test_a_report_has_a_reason_and_so_has_a_missing_verdict():
    for row in ROWS:
        assert row["verdict"] in opinions.VERDICTS
        assert ("examined" in row) == (row["verdict"] in opinions.REPORTS)
        needed = row["verdict"] in (*opinions.REPORTS, *opinions.UNSURE)
        assert bool(row.get("remarks")) == needed, row


def test_no_row_is_there_twice():
    of = ("tool", "kernel", "target", "dtype", "tile", "call")
    count = Counter(str([row.get(name) for name in of]) for row in ROWS)
    assert not [row for row, n in count.items() if n > 1]


def row(**more):
    given = dict(tool="sentryward", version="1", file="pool", kernel="a_kernel", target="sm_80")
    return given | dict(dtype="bfloat16", tile="16x16", verdict="race_free", seconds=60.0) | more


def test_a_report_is_shown_as_what_came_of_it():
    rows = [row(), row(), row(verdict="potential_race", examined=True, remarks="one value")]
    assert opinions.verdicts(rows) == "2 free of races, 1 race reported (false)"
    rows[2]["examined"] = False
    assert opinions.verdicts(rows) == "2 free of races, 1 race reported (not examined)"
    assert opinions.verdicts([]) == "–"
    assert opinions.reports(rows).splitlines()[2:] == [
        "| `a_kernel` | sentryward | sm_80 bfloat16 `16x16` | one value |"
    ]


def test_each_column_has_its_tool_and_target():
    rows = [
        row(tool="ttsem", target="sm_90", verdict="clean", kernel="b_kernel"),
        row(verdict="timeout", remarks="180 s"),
        row(target="sm_100", verdict="unsupported", remarks="a branch"),
    ]
    line = opinions.by_file(rows, Counter(a_kernel=2, b_kernel=3), Counter({"pool.py": 4}))
    expected = "| 2 | 5 | 4 | 1 clean | 1 out of time | 1 not supported |"
    assert line.splitlines()[2] == f"| [pool.py](../kernels/pool.py) {expected}"
    assert len(opinions.unsure(rows).splitlines()) == 4
    assert "| sentryward 1 | sm_80, sm_100 | 1 | 2 | 1 out of time, 1 not" in opinions.asked(rows)


@pytest.mark.parametrize("found, words", [(["race", "wrong"], "a race, a w"), ([], "**nothing")])
def test_what_was_seen_of_a_planted_fault(found, words):
    table = opinions.controls([dict(fault="a mask is missing", calls=3, seen=found)])
    assert f"| a mask is missing | 3 | {words}" in table


def test_what_was_said_of_cut_barriers():
    cut = dict(kernel="a_kernel", target="sm_80", tile="16x16", line=9)
    rows = [
        cut | dict(instruction="bar.sync 0", verdict="potential_race"),
        cut | dict(instruction="bar.sync 1", verdict="race_free"),
    ]
    line = "| `a_kernel`, sm_80 `16x16` | `bar.sync` | 2 | 1 |"
    assert opinions.cuts(rows).splitlines()[2:] == [line]

"""Where a kernel asks much of memory, docs/memory.md says why.

test_tables.py holds the page's tables to the file of counts, and tests/kernels/test_compile.py the
file to the kernels.
"""

from tests.tools import memory_counts
from tilelab.perf.clock.host_overhead import ROOT


def test_what_stands_out_has_a_reason_that_the_page_explains():
    page, used = (ROOT / "docs" / "memory.md").read_text(), set()
    for row in memory_counts.read()["launches"]:
        for name in memory_counts.IDEALS:
            if (memory_counts.ratio(row, name) or 0) >= memory_counts.MUCH:
                words = memory_counts.cause(row, name)
                assert words, f"no reason: {memory_counts.describe(row)}"
                assert f"- **{words}**: " in page, words
                used.add((name, words))
    reasons = {(name, x[0]) for name, causes in memory_counts.CAUSES.items() for x in causes}
    assert used == reasons, f"reasons of nothing: {reasons - used}"


def test_a_line_is_for_a_kernel_and_both_targets():
    row = {"call": "f", "type": "tf32", "kernel": "k", "tile": "16 w4 s3", "at": {}}
    row |= dict.fromkeys(("sectors", "sectors, ideal"), 0)
    rows = [
        row | {"target": target, "wavefronts": n, "wavefronts, ideal": 10, "at": {"wavefronts": at}}
        for target, n, at in (("sm_80", 20, "a = a + 0.0"), ("sm_90", 40, "a = a + 0.0"),
                              ("sm_90", 14, "b"))
    ]  # fmt: skip
    lines = memory_counts.much(rows, "wavefronts").splitlines()
    assert lines[2:] == [
        "| `f` | `tf32` | `k` | `16 w4 s3` | 2.00 | 4.00 | summed and multiplied |"
    ]

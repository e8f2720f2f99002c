"""The README says what the committed results say."""

from perf import readme
from perf.host import ROOT


def test_the_tables_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.fast_tiles() in text
    assert readme.speeds() in text

"""docs/machine.md shows what `tilelab run-ptx` prints."""

import re
from pathlib import Path

import pytest
import triton

from tilelab.__main__ import main

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "machine.md").read_text()
FILE = re.search(r"`rows\.py`.*?```python\n(.*?)```", PAGE, re.S)[1]
SHOWN = re.findall(r"```text\n\$ tilelab (run-ptx rows\.py:\S+)\n(.*?)```", PAGE, re.S)
TESTED = re.search(r"Tested: torch \S+ with triton (\S+)", (ROOT / "README.md").read_text())[1]


def facts(text):
    """What is the same with every triton: what is wrong, and where in Python."""
    text = re.sub(r" \(PTX line .*?\)(?= <|\s|$)", "", text)
    text = re.sub(r"standard.py:\d+", "standard.py", text)
    return [line.strip() for line in text.splitlines()
            if re.match(r"\s*(race|fault|at|and)\b", line)]  # fmt: skip


@pytest.mark.parametrize("words, shown", SHOWN, ids=[words for words, _ in SHOWN])
def test_the_page_shows_what_is_printed(words, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.py").write_text(FILE.replace("edited.ptx", f"{tmp_path}/edited.ptx"))
    assert main(words.split()) == 1
    printed = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    printed = re.sub(r"\S*/site-packages/", ".../", printed)
    seconds = r"\d+\.\d\d s\b"
    if triton.__version__ == TESTED:
        want, printed = re.sub(seconds, "", shown), re.sub(seconds, "", printed)
        assert printed.rstrip().endswith(want.rstrip())
    else:
        assert facts(printed)[-len(facts(shown)) :] == facts(shown)


def test_the_page_shows_all_three():
    assert len(SHOWN) == 3

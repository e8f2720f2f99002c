"""What a person sees while a command works: lines without a terminal, a bar with one."""

import io
import re
import sys
import time

import pytest

from tilelab.perf.commands import progress
from tilelab.perf.commands.progress import Progress, duration


@pytest.fixture
def stderr(monkeypatch):
    """What is written to stderr, which is a terminal or not."""

    def make(terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


@pytest.mark.core
def test_without_a_terminal_there_is_a_line_now_and_then(stderr, monkeypatch):
    """Also while nothing is finished: that is when a person takes it for hung."""
    monkeypatch.setattr(progress, "LINE_S", 0.1)
    stream = stderr(False)
    with Progress("sm_90", 4) as p:
        time.sleep(0.25)
        before = stream.getvalue().splitlines()
        assert len(before) >= 2 and set(before) == {"sm_90: 0 of 4 tiles in 0 s"}
        p.update()
        time.sleep(0.15)
        assert "sm_90: 1 of 4 tiles in 0 s, about 1 s left" in stream.getvalue()
        for _ in range(3):
            p.update()
    assert stream.getvalue().splitlines()[-1] == "sm_90: 4 of 4 tiles in 0 s"
    said = stream.getvalue()
    time.sleep(0.25)
    assert stream.getvalue() == said and "\r" not in said


def test_what_is_short_gets_no_line(stderr):
    stream = stderr(False)
    assert list(Progress("sm_90", 3).over("abc")) == ["a", "b", "c"]
    assert stream.getvalue() == ""


def test_with_a_terminal_there_is_a_bar(stderr, monkeypatch):
    monkeypatch.setattr(progress, "REFRESH_S", 0.1)
    stream = stderr(True)
    with Progress("sm_90", 4) as p:
        time.sleep(0.25)
        drawn = stream.getvalue().count("\r")
        assert drawn >= 2  # its clock moves while nothing is finished
        for _ in range(4):
            p.update()
    assert re.search(r"sm_90: 100%.*4/4", stream.getvalue())


def test_a_loop_that_is_left_early_ends_the_lines(stderr, monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.1)
    stream = stderr(False)
    for _ in Progress("matmul", 9).over(range(9)):
        time.sleep(0.15)
        break
    said = stream.getvalue()
    assert said.splitlines()[-1] == "matmul: 0 of 9 tiles in 0 s"
    time.sleep(0.25)
    assert stream.getvalue() == said


def test_the_time_that_is_left():
    p = Progress("sm_90", 226)
    p.done = 57
    assert p.text(15) == "sm_90: 57 of 226 tiles in 15 s, about 44 s left"
    assert p.text(600) == "sm_90: 57 of 226 tiles in 10 min, about 30 min left"
    assert Progress("x", 1, "problem").text(2) == "x: 0 of 1 problem in 2 s"
    assert [duration(s) for s in (0.2, 99, 100, 5940, 11_100)] == [
        "0 s", "99 s", "2 min", "99 min", "3 h 5 min",
    ]  # fmt: skip

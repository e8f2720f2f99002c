"""`pytest --on sm_90`: the same tests, with every launch executed by perf/machine.

    pytest --on sm_90 tests/kernels/test_softmax.py                 compiled PTX instead of the
    pytest --on sm_80 --schedule random --seed 3 tests/kernels      interpreter, and no GPU
    pytest --on sm_90 --repeat 20 tests/kernels/test_softmax.py     each launch in 20 more orders

No test is written for it. The process compiles (TRITON_INTERPRET=0), kernels are chosen as on a GPU
of this target, and `perf.machine.executing` gets the launches. A test fails if a kernel faults, or
if the machine reports something. It is skipped, with the reason,

    if it launches no kernel;
    if an operator says that this GPU cannot do it: float8 on sm_80, a tile of a kernel for TMA;
    if it wants a tile that does not fit this GPU: some need the shared memory of sm_90;
    if it is marked `interpreter`.

At the end stands what was run: launches by kernel, and how much of their PTX was executed. Not
executed is what no test reaches: a branch for a shape that none has. `--missed` lists it.

`--record` keeps what each test took and what it reached: tests/tools/ptx_sample.py chooses by that.
"""

import json
import pathlib
import pickle
import re
import time
import zlib
from unittest import mock

import hypothesis
import pytest

from tilelab.kernels import _tiles  # before `executing`, which takes over the kernels' launches
from tilelab.perf import machine
from tilelab.perf.machine import compiler

# isort: split
from triton.runtime.errors import OutOfResources

# An example takes a hundred times longer than in the interpreter: few of them. And one that fails
# is not made smaller, which would take a hundred more.
hypothesis.settings.register_profile(
    "machine",
    parent=hypothesis.settings.default,
    max_examples=3,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("machine")

TMA = re.compile(r"the tma(_ws)? kernel of \w+ cannot take these operands")


class OnMachine:
    """The plugin: registered by conftest.py where `--on` is given."""

    def __init__(
        self, target: str, schedule: str, seed: int, repeat: int = 0, missed: bool = False,
        record: str | None = None,
    ) -> None:  # fmt: skip
        self.target, self.list_missed = target, missed
        self.record = pathlib.Path(record) if record else None
        order = dict(schedule=schedule, seed=seed, repeat=repeat)
        self.context = machine.executing(target, **order, counting=False)
        self.fitting = mock.patch.object(compiler, "check_resources", check_resources)
        self.coverage = machine.Coverage()

    def pytest_sessionstart(self):
        """From now on launches go to the machine: fixtures and modules may launch, too."""
        self.reports = self.context.__enter__()
        self.fitting.start()

    def pytest_sessionfinish(self, session):
        self.fitting.stop()
        self.context.__exit__(None, None, None)
        if hasattr(session.config, "workeroutput"):  # one of several processes (pytest-xdist)
            session.config.workeroutput["coverage"] = pickle.dumps(self.coverage)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """One of several processes has ended."""
        if "coverage" in getattr(node, "workeroutput", {}):
            self.coverage.merge(pickle.loads(node.workeroutput["coverage"]))

    def pytest_runtest_setup(self, item):
        if mark := item.get_closest_marker("interpreter"):
            pytest.skip(f"not on the machine: {mark.args[0]}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Each test begins with the same seed, whichever ran before it."""
        self.reports.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        begin = time.process_time()
        try:
            result = yield
        except (TypeError, ValueError) as e:
            if "on this GPU" in str(e) or (self.target == "sm_80" and TMA.match(str(e))):
                pytest.skip(str(e))
            raise
        finally:
            seconds = time.process_time() - begin
            for report in self.reports:
                self.coverage.add(report)
        if wrong := [str(report) for report in self.reports if report.findings]:
            raise AssertionError("\n\n".join(wrong))
        if not self.reports:
            pytest.skip("launches no kernel")
        if self.record:
            seconds -= sum(report.compiling for report in self.reports)
            line = dict(id=item.nodeid, target=self.target, seconds=round(seconds, 3))
            item.user_properties.append(("record", json.dumps(line | reached(self.reports))))
        return result

    def pytest_runtest_logreport(self, report):
        """Of one process, or of several in the one that started them: a test has ended."""
        lines = [text for name, text in report.user_properties if name == "record"]
        if report.when == "call" and report.passed and lines and self.record:
            with self.record.open("a") as file:
                file.write(lines[0] + "\n")

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"executed as PTX for {self.target}")
        terminalreporter.write_line(str(self.coverage))
        if self.list_missed:
            for name in sorted(self.coverage.totals):
                for line in self.coverage.missed(name):
                    terminalreporter.write_line(f"{name}, not executed: {line}")


def check_resources(*args, original=compiler.check_resources):
    """A tile that the lesson has chosen must fit, one that the test has chosen need not."""
    try:
        original(*args)
    except OutOfResources as e:
        if _tiles._forced:
            pytest.skip(f"the tile does not fit: {e}")
        raise


def reached(reports: list[machine.Report]) -> dict:
    """What the launches of a test have reached.

    "kinds" are a kernel with the types of its tensors, or with a number of its tile; "statements"
    are numbers that stand for an opcode at a source line of a kernel; "compiled" are the seconds
    that it took to compile, by the hash of the PTX.
    """
    kinds, statements, compiled = set(), set(), {}
    for report in reports:
        compiled.setdefault(report.code, round(report.compiling, 3))
        types = sorted({kind for kind in report.types.values() if kind.startswith(("*", "tens"))})
        kinds.add(f"{report.kernel}: {' '.join(types)}")
        for name, x in report.constants.items():
            if name.startswith(("BLOCK", "SPLIT", "num_")) or isinstance(x, bool):
                kinds.add(f"{report.kernel}: {name}={x}")
        for inst, executed in zip(report.instructions, report.executed, strict=True):
            if executed:
                key = " ".join((report.kernel, *machine.statement(inst)))
                statements.add(zlib.crc32(key.encode()))
    return dict(kinds=sorted(kinds), statements=sorted(statements), compiled=compiled)

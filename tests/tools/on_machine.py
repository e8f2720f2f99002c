"""`pytest --on sm_90`: the same tests, with every launch executed by perf/machine.

    pytest --on sm_90 tests/kernels/test_softmax.py                 compiled PTX instead of the
    pytest --on sm_80 --schedule random --seed 3 tests/kernels      interpreter, and no GPU

No test is written for it. The process compiles (TRITON_INTERPRET=0), kernels are chosen as on a GPU
of this target, and `perf.machine.executing` gets the launches. A test fails if a kernel faults, or
if the machine reports something.

At the end stands what was run: launches by kernel, and how much of their PTX was executed. Not
executed is what no test reaches: a branch for a shape that none has.
"""

import pickle

import hypothesis
import pytest

from tilelab import kernels  # noqa: F401  (before `executing`: it takes over their launches)
from tilelab.perf import machine

# An example that fails is not made smaller: that would take a hundred more.
hypothesis.settings.register_profile(
    "machine",
    parent=hypothesis.settings.default,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("machine")


class OnMachine:
    """The plugin: registered by conftest.py where `--on` is given."""

    def __init__(self, target: str, schedule: str, seed: int) -> None:
        self.target = target
        order = dict(schedule=schedule, seed=seed)
        self.context = machine.executing(target, **order, counting=False)
        self.coverage = machine.Coverage()

    def pytest_sessionstart(self):
        """From now on launches go to the machine: fixtures and modules may launch, too."""
        self.reports = self.context.__enter__()

    def pytest_sessionfinish(self, session):
        self.context.__exit__(None, None, None)
        if hasattr(session.config, "workeroutput"):  # one of several processes (pytest-xdist)
            session.config.workeroutput["coverage"] = pickle.dumps(self.coverage)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """One of several processes has ended."""
        if "coverage" in getattr(node, "workeroutput", {}):
            self.coverage.merge(pickle.loads(node.workeroutput["coverage"]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Each test begins with the same seed, whichever ran before it."""
        self.reports.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        try:
            result = yield
        finally:
            for report in self.reports:
                self.coverage.add(report)
        if wrong := [str(report) for report in self.reports if report.findings]:
            raise AssertionError("\n\n".join(wrong))
        return result

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"executed as PTX for {self.target}")
        terminalreporter.write_line(str(self.coverage))

"""The demo's first training steps as PTX: batch, forward, loss, backward, optimizer and record.

Every launch is executed by the machine, and what it computes is compared with Triton's interpreter,
in a process of its own.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import triton

from tests.tools import demo_steps
from tests.tools.demo_steps import BATCH, RATE, Step
from tests.tools.tolerance import bound, compare, wrong_results
from tilelab.kernels import _launch
from tilelab.nets.config import Config
from tilelab.perf import machine
from tilelab.perf.compiler import aot

RUNS = [("sm_90", torch.float32), ("sm_90", torch.bfloat16)]
# triton 3.6.0 has no fence between a cp.async that fills shared memory and a wgmma that reads it,
# if the wgmma has its first operand in registers. triton 3.9.0 has it.
TRITONS_OWN = {"missing fence"} if triton.__version__.startswith("3.6.") else set()
# The longest sum is that of a gradient of the first convolution, over its windows. From an image to
# a gradient there are seven tensors: after each layer, before each, and the gradient itself.
TERMS, ROUNDINGS = BATCH * 13 * 13, 7


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A function of a dtype: the steps by the interpreter, which begins at once."""
    file = tmp_path_factory.mktemp("demo") / "steps.pt"
    names = [str(dtype)[6:] for dtype in dict.fromkeys(dtype for _, dtype in RUNS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tools.demo_steps", file, *names],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=demo_steps.__file__.partition("/tests/")[0],
    )  # fmt: skip

    def steps(dtype):
        assert process.wait() == 0
        return [Step(*fields) for fields in torch.load(file)[str(dtype)[6:]]]

    yield steps
    process.kill()


def launches(target, dtype, batch):
    """The names of the kernels that the steps would launch on such a GPU."""
    with _launch.record(aot.device(target)) as events, aot.unchecked():
        demo_steps.take(demo_steps.make(dtype, batch))
    return [event.kernel.__name__ for event in events if isinstance(event, _launch.Launch)]


def reach(mine, theirs, name):
    """By how much a parameter may differ after some steps, if its gradients differ as they do.

    AdamW subtracts RATE * m / (sqrt(v) + eps). m is a mean of the gradients so far, and v one of
    their squares. If no gradient differs by more than d, then neither does m, nor sqrt(v), which is
    a norm; and |m| < 1.01 * sqrt(v) in three steps. So the quotient differs by less than
    2.01 * d / (sqrt(v) + eps), and by less than 2.02 in any case. Beside that, each of the two
    rounds its quotient by 16 units at most, and the parameter twice.
    """
    difference, m, v, allowed = 0.0, 0.0, 0.0, 0.0
    unit = torch.finfo(torch.float32).eps / 2
    for t, (a, b) in enumerate(zip(mine, theirs, strict=True), 1):
        g, h = (step.gradients[name].double() for step in (a, b))
        difference = torch.maximum(torch.as_tensor(difference), (g - h).abs())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        scale = (v / (1 - 0.999**t)).sqrt() + 1e-8
        assert ((m / (1 - 0.9**t)).abs() <= 1.01 * scale).all()
        update = (2.01 * difference / scale).clamp(max=2.02)
        allowed += RATE * (update + 2 * 16 * unit) + 4 * unit * a.parameters[name].abs().double()
    return allowed


@pytest.mark.parametrize("target, dtype", RUNS)
def test_the_first_steps_are_those_of_the_interpreter(target, dtype, interpreted):
    with machine.executing(target, counting=False) as reports:
        step = demo_steps.make(dtype)
        begun = {name: p.detach().clone() for name, p in step.model.named_parameters()}
        mine = demo_steps.take(step)
    wrong = [finding for report in reports for finding in report.findings]
    assert [str(finding) for finding in wrong if finding.kind not in TRITONS_OWN] == []
    executed = [report.kernel for report in reports]
    assert executed == launches(target, dtype, BATCH)
    assert set(launches(target, dtype, Config().batch_size)) <= set(executed)

    theirs = interpreted(dtype)
    limit = 2 * bound(dtype, TERMS, ROUNDINGS)  # each of the two may be off by so much
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert abs(a.loss - b.loss) <= limit * b.loss
        assert i or abs(b.loss - math.log(10)) < 0.2  # ten digits, and nothing is known yet
        for name, want in b.gradients.items():
            want = want.double()
            assert compare(a.gradients[name], want, limit) is None, (i, name)
            for what, wrong in wrong_results(want):
                assert compare(wrong, want, limit), f"{name} could as well be {what}"
        for name, want in b.parameters.items():
            allowed = reach(mine[: i + 1], theirs[: i + 1], name)
            assert ((a.parameters[name] - want).abs() <= allowed).all(), (i, name)
            assert allowed.median() < RATE / 1000 < (want - begun[name]).abs().median()

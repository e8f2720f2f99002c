"""The gate lets through what is right, and nothing else."""

import re

import pytest
import torch

from tests.tools.inputs import DEVICE
from tilelab.perf.clock import correctness
from tilelab.perf.clock.correctness import Gate, relative_error
from tilelab.perf.work.workloads import Workload, prepare

pytestmark = pytest.mark.core  # with the oldest triton, too

W = Workload("matmul", "fwd", "float32", "ieee", dict(M=33, N=20, K=50), "test")


def planted(change):
    """Our matmul with a fault: `change` returns the results for the right ones and the inputs."""
    right = prepare(W, "tilelab", DEVICE, 7)

    def call():
        return (change(right()[0], right.inputs),)

    call.inputs = right.inputs
    return call


def unwritten(c, inputs):
    c = c.clone()
    c[-1] = torch.empty_like(c[-1])
    return c


def spoils_its_input(c, inputs):
    inputs[0][3, 3] += 1
    return c


FAULTS = {
    "zeros": (lambda c, _: torch.zeros_like(c), "wrong"),
    "a row too far": (lambda c, _: c.roll(1, 0), "wrong"),
    "one element of 660": (
        lambda c, _: c.index_fill(1, torch.tensor(3, device=c.device), 0.0),
        "wrong",
    ),
    "a part in a thousand too large": (lambda c, _: c * 1.001, "wrong"),
    "a row that nobody wrote": (unwritten, "error nan"),
    "another shape": (lambda c, _: c.t(), r"has shape \[20, 33\], expected \[33, 20\]"),
    "an input that is written to": (spoils_its_input, "changes its inputs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_caught(fault):
    change, message = FAULTS[fault]
    verdict = Gate(W, DEVICE, 7).check(planted(change))
    assert verdict.problem is not None
    assert re.search(message, verdict.problem)


def test_a_right_kernel_passes():
    verdict = Gate(W, DEVICE, 7).check(planted(lambda c, _: c))
    assert verdict.problem is None and verdict.error < verdict.tolerance < 1e-5


def test_a_missing_result_is_caught():
    call = planted(lambda c, _: c)
    two = Gate(W, DEVICE, 7)
    two.expected *= 2
    assert two.check(call).problem == "1 results instead of 2"


def test_poison_fills_what_torch_allocates_and_restores_the_settings():
    before = torch.are_deterministic_algorithms_enabled()
    with correctness.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty(2, 3, 4, 5, memory_format=torch.channels_last).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_peers_are_judged_as_they_are_timed():
    seen = []

    def look(c, _):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return c

    for impl in ("tilelab", "torch"):
        assert Gate(W, DEVICE, 7).check(planted(look), impl).problem is None
    assert seen == [True, False]


def test_relative_error():
    ref = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), ref) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0]), torch.zeros(1, dtype=torch.float64)) == 1.0

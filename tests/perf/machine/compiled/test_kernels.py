"""What the machine has found in our kernels, and finds again where the remedy is taken away."""

import importlib

import pytest
import torch
import triton

from tilelab import kernels
from tilelab.kernels._tiles import use_tile
from tilelab.perf import machine

SMALL = dict(BLOCK_M=16, BLOCK_N=128, num_warps=4)


def gradient(x):
    """Of rows of 33: a thread has one element each, and adds its product to that of another."""
    x, dy = x[:5, :33].clone().requires_grad_(), x[5:10, :33]
    kernels.softmax(x).backward(dy)


def in_turns(x):
    """Rows longer than a block: threads add up what each of them has, times a correction."""
    with use_tile("softmax", SMALL):
        kernels.softmax(x)


def loss(x):
    with use_tile("cross_entropy", SMALL):
        kernels.cross_entropy(x, torch.arange(len(x)) % x.shape[1])


def found(call, target):
    x = torch.randn(17, 131, generator=torch.Generator().manual_seed(0))
    with machine.executing(target, counting=False) as reports:
        call(x)
    return [finding.message for report in reports for finding in report.findings]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("call, lesson", [
    (gradient, "softmax"), (in_turns, "softmax"), (loss, "cross_entropy")
])  # fmt: skip
def test_all_threads_have_the_same_sum_of_a_row(call, lesson, target, monkeypatch):
    assert found(call, target) == []
    lesson = importlib.import_module(f"tilelab.kernels.{lesson}")
    launch = lesson.launch

    def fused(*args, enable_fp_fusion=True, **meta):
        launch(*args, **meta)

    monkeypatch.setattr(lesson, "launch", fused)
    if not triton.__version__.startswith("3.6."):  # there they do not store to one place
        assert "write different values to one place" in found(call, target)[0]

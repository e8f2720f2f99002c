"""Products whose loops have more steps than stages: each buffer of the pipeline is filled twice."""

import pytest
import torch
import triton

from tests.tools.convolutions import integers
from tests.tools.inputs import gradients
from tilelab import kernels
from tilelab.kernels import _launch
from tilelab.perf import machine
from tilelab.perf.work.workloads import set_precision


def linear(dtype):
    """A classifier of many rows: the weight's gradient sums over them, the bias's beside it."""
    x, w = integers(600, 72, dtype=dtype), integers(72, 72, dtype=dtype, seed=1)
    b = integers(72, dtype=dtype, seed=2)
    return (lambda *xs: kernels.matmul(*xs)), lambda a, w, b: a @ w + b, (x, w, b)


def wide(dtype):
    x, w = integers(24, 600, dtype=dtype), integers(600, 40, dtype=dtype, seed=1)
    return kernels.matmul, lambda a, w: a @ w, (x, w)


def convolution(dtype, channels=72, filters=40, pool=False):
    x = integers(3, channels, 12, 13, dtype=dtype).to(memory_format=torch.channels_last)
    w = integers(filters, channels, 3, 3, dtype=dtype, seed=1)
    w, b = w.to(memory_format=torch.channels_last), integers(filters, dtype=dtype, seed=2)
    if pool:
        return (
            kernels.conv2d_relu_pool,
            lambda *xs: torch.max_pool2d(torch.relu(torch.conv2d(*xs)), 2),
            (x, w, b),
        )
    return (
        lambda *xs: kernels.conv2d(*xs, padding=1),
        lambda *xs: torch.conv2d(*xs, padding=1),
        (x, w, b),
    )


CALLS = {
    "matmul": wide,
    "matmul and its gradients": linear,
    "conv2d and its gradients": convolution,
    "conv2d, channels that TMA cannot read": lambda dtype: convolution(dtype, 70, 36),
    "conv2d, pool": lambda dtype: convolution(dtype, pool=True),
}
DTYPES = {"bfloat16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32")}
if triton.__version__.startswith("3.6."):  # leaves fences out: docs/verification.md
    del DTYPES["tf32"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_wgmma_and_cp_async_of_more_steps_than_stages(name, dtype, monkeypatch):
    monkeypatch.setattr(_launch.Device, "kernels", ("pointer",))
    dtype, precision = DTYPES[dtype]
    set_precision(precision)
    ours, theirs, inputs = CALLS[name](dtype)
    doubles = [x.double() for x in inputs]
    dy = integers(*theirs(*doubles).shape, dtype=dtype, seed=9)
    want, wanted = gradients(theirs, doubles, dy.double())
    with machine.executing("sm_90", counting=False) as reports:
        y, got = gradients(ours, inputs, dy)
    assert not [str(finding) for report in reports for finding in report.findings]
    for g, w in zip((y, *got), (want, *wanted), strict=True):
        assert (g.double() - w).abs().max() <= 0.01 * w.abs().max()

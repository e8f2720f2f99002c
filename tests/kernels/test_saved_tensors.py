"""What operators keep for their backward, in bytes: no more than the gradients asked for read.

And how many kernels the demo's backward launches. Both are pinned: each number has its reason
beside it.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tools.inputs import DEVICE, randn
from tilelab import kernels
from tilelab.kernels import _launch
from tilelab.nets.models import build

N, C, H, W, K = 2, 5, 8, 6, 7
X, WEIGHT, Y, POOLED = N * C * H * W, K * C * 9, N * K * H * W, N * K * H * W // 4
ROWS, CLASSES = 12, 10


def inputs(name):
    """The tensors of a call, by name."""
    shapes = {
        "matmul": dict(a=(ROWS, 16), b=(16, CLASSES), bias=(CLASSES,)),
        "bias_relu": dict(x=(N, C, H, W), bias=(C,)),
        "softmax": dict(x=(ROWS, CLASSES)),
        "cross_entropy": dict(x=(ROWS, CLASSES)),
        "max_pool2d": dict(x=(N, C, H, W)),
    }.get(name, dict(x=(N, C, H, W), weight=(K, C, 3, 3), bias=(K,)))
    return {k: randn(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}


TARGET = torch.arange(ROWS) % CLASSES
CALLS = {
    "conv2d": lambda x, weight, bias: kernels.conv2d(x, weight, bias, padding=1),
    "conv2d, ReLU": lambda x, weight, bias: kernels.conv2d(
        x, weight, bias, padding=1, activation="relu"
    ),
    "conv2d_relu_pool": lambda x, weight, bias: kernels.conv2d_relu_pool(x, weight, bias, 1),
    "matmul": kernels.matmul,
    "bias_relu": kernels.bias_relu,
    "softmax": kernels.softmax,
    "cross_entropy": lambda x: kernels.cross_entropy(x, TARGET.to(DEVICE)),
    "max_pool2d": lambda x: kernels.max_pool2d(x, 2),
}
# Of a call and the gradients that are asked for, the bytes.
KEPT = {
    ("conv2d", "x weight bias"): 4 * (X + WEIGHT),
    ("conv2d", "x"): 4 * WEIGHT,
    ("conv2d", "weight"): 4 * X,
    ("conv2d", "bias"): 0,
    ("conv2d, ReLU", "x weight bias"): 4 * (X + WEIGHT + Y),  # the next layer has y anyway
    ("conv2d, ReLU", "x"): 4 * (WEIGHT + Y),
    ("conv2d, ReLU", "weight bias"): 4 * (X + Y),
    ("conv2d, ReLU", "bias"): 4 * Y,
    ("conv2d_relu_pool", "x weight bias"): 4 * (X + WEIGHT) + POOLED,  # a byte a maximum
    ("conv2d_relu_pool", "x"): 4 * WEIGHT + POOLED,
    ("conv2d_relu_pool", "weight bias"): 4 * X + POOLED,
    ("conv2d_relu_pool", "bias"): POOLED,
    ("matmul", "a b bias"): 4 * 16 * (ROWS + CLASSES),
    ("matmul", "a"): 4 * 16 * CLASSES,
    ("matmul", "b"): 4 * 16 * ROWS,
    ("matmul", "bias"): 0,
    ("bias_relu", "x bias"): 4 * X,  # y
    ("softmax", "x"): 4 * ROWS * CLASSES,  # y
    # The logits, the classes, two numbers a row and one for all.
    ("cross_entropy", "x"): 4 * ROWS * CLASSES + 8 * ROWS + 2 * 4 * ROWS + 4,
    ("max_pool2d", "x"): X // 4,  # a byte a maximum
}


class Zeros(TorchDispatchMode):
    """Counts the tensors of zeros that are made."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += "zeros" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.core
@pytest.mark.parametrize("name, wanted", KEPT, ids=[f"{n}: {w}" for n, w in KEPT])
def test_what_is_kept(name, wanted):
    tensors = inputs(name)
    for key in wanted.split():
        tensors[key].requires_grad_()
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = CALLS[name](*tensors.values())
    assert sum(storages.values()) == KEPT[name, wanted]
    with Zeros() as zeros:
        y.backward(torch.ones_like(y))
    assert zeros.made == 0
    assert [k for k, t in tensors.items() if t.grad is not None] == wanted.split()


@pytest.mark.skipif(not _launch.INTERPRET, reason="records on CPU tensors")
def test_the_launches_of_the_demos_backward(monkeypatch):
    """With 512 images, on a GPU in general."""
    monkeypatch.setattr(_launch, "INTERPRET", False)  # whose sums are not split
    model = build("cnn", (1, 28, 28), 10)
    x = torch.empty(512, 1, 28, 28).to(memory_format=torch.channels_last)
    target = torch.zeros(512, dtype=torch.int64)
    with _launch.record():
        loss = kernels.cross_entropy(model(x), target)
    with _launch.record() as events:
        loss.backward()
    names = [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]
    assert [name.removesuffix("_kernel") for name in names] == [
        "cross_entropy_backward",
        "matmul",  # the gradients of weight and bias, in parts of the batch
        "matmul_reduce",
        "matmul",
        "conv2d_relu_pool_input_grad",
        "conv2d_relu_pool_weight_grad",
        "sum_partials",  # of the weight and of the bias
        "conv2d_relu_pool_weight_grad",  # images need no gradient
        "sum_partials",
    ]

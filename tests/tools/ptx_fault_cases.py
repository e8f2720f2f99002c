"""The kernels in which ptx_faults.py plants faults: every kind that this library has.

Each problem is as small as it can be while every loop goes on and nothing divides: a stage of a
pipeline is used more than once, the last block hangs over the border, a persistent program has
several tiles. `launches` makes the launches of a case once, and keeps what is needed to run each of
them again with another program: no compiler and no PyTorch takes part in that.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.tools.inputs import gradients, laid_out, randn
from tilelab import kernels
from tilelab.kernels import _tiles
from tilelab.perf import machine
from tilelab.perf.machine import core, memory, ptx
from tilelab.perf.work.workloads import set_precision

PATTERN = 0x7B
BF16, F32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A call of an operator.

    Attributes:
        target: sm_80 or sm_90.
        call: makes the launches.
        kernels: those of them that get faults, each at its first launch.
        tiles: that operators are forced to take.
        precision: of float32 products.
    """

    target: str
    call: Callable[[], Any]
    kernels: tuple[str, ...]
    tiles: dict[str, dict]
    precision: str = "ieee"


class Launch(NamedTuple):
    """All that a Core is made of, before the launch.

    Attributes:
        program: the kernel as it was parsed.
        grid: programs in x, y and z.
        parameters: their values by name.
        shared: bytes of shared memory of a CTA.
        memory: global memory.
        maps: tensor maps by address.
    """

    program: ptx.Program
    grid: tuple[int, ...]
    parameters: dict[str, Any]
    shared: int
    memory: memory.GlobalMemory
    maps: dict[int, Any]

    def core(self, make: Callable[..., core.Core] = core.Core, **options: Any) -> core.Core:
        """A machine for this launch, with a memory of its own."""
        return make(
            self.program, self.grid, self.parameters, self.shared, copied(self.memory), self.maps,
            **options,
        )  # fmt: skip


def copied(of: memory.GlobalMemory) -> memory.GlobalMemory:
    """A copy of a global memory."""
    new = copy.copy(of)
    new.bytes, new.valid, new.initialised = of.bytes.copy(), of.valid, of.initialised.copy()
    new._views = {n: new.bytes.view(f"u{n}") for n in new._views}
    return new


def launches(case: Case) -> list[Launch]:
    """The launches of a case that get faults.

    What a launch only writes is filled with a pattern first: a run that writes nothing must differ.
    """
    found: dict[str, Launch] = {}

    def build(program: ptx.Program, *given: Any, **options: Any) -> core.Core:
        grid, parameters, shared, where, maps = given
        if program.name in case.kernels and program.name not in found:
            found[program.name] = Launch(program, grid, parameters, shared, copied(where), maps)
        return core.Core(program, *given, **options)

    set_precision(case.precision)
    with contextlib.ExitStack() as stack:
        for op, tile in case.tiles.items():
            stack.enter_context(_tiles.use_tile(op, tile))
        stack.enter_context(machine.executing(case.target, counting=False, build=build))
        case.call()
    if missing := set(case.kernels) - set(found):
        raise ValueError(f"the case launches no {', '.join(sorted(missing))}")
    for launch in found.values():
        _fill_outputs(launch)
    return [found[name] for name in case.kernels]


def _fill_outputs(launch: Launch) -> None:
    """Fill each tensor that changes, unless the result is another one then: it is read, too."""
    for begin, end, _ in launch.memory.names:
        before = launch.memory.bytes[begin:end].copy()
        right = launch.core().run().global_.bytes
        if (right[begin:end] == before).all():
            continue
        launch.memory.bytes[begin:end] = PATTERN
        now = launch.core().run().global_.bytes
        kept = now[begin:end] == PATTERN  # never written, or written with this
        if (
            (now != right)[begin:end][~kept].any()
            or (now != right)[:begin].any()
            or (now != right)[end:].any()
        ):
            launch.memory.bytes[begin:end] = before


# --- the cases ------------------------------------------------------------------------------------


def train(fn: Callable, *inputs: torch.Tensor, **options: Any) -> None:
    """Forward, and the gradients for a random gradient of the result."""
    shape = fn(*inputs, **options).shape
    gradients(lambda *xs: fn(*xs, **options), inputs, randn(*shape, dtype=inputs[0].dtype, seed=9))


def images(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return laid_out(randn(*shape, dtype=dtype, seed=seed), "channels_last")


def pointer(m: int, n: int, k: int, warps: int = 4, stages: int = 3, **more: int) -> dict:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages, **more)


def matmul(m: int, n: int, k: int, dtype: torch.dtype = BF16) -> None:
    a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)
    kernels.matmul(a, b, randn(n, dtype=dtype, seed=2), "relu")


def matmul_of_columns(m: int, n: int, k: int) -> None:
    """Both operands transposed: A and B are read the other way round."""
    a, b = randn(k, m, dtype=BF16).t(), randn(n, k, dtype=BF16, seed=1).t()
    kernels.matmul(a, b, randn(n, dtype=BF16, seed=2))


def scaled_matmul(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = randn(m, k), randn(n, k, seed=1)
    if dtype == torch.int8:
        a, b = (40 * a).clamp(-127, 127), (40 * b).clamp(-127, 127)
    scales = randn(m, seed=2).abs() + 0.5, randn(n, seed=3).abs() + 0.5
    kernels.scaled_matmul(
        a.to(dtype), b.to(dtype).t(), *scales, randn(n, dtype=BF16, seed=4), "relu", BF16
    )


def conv2d(channels: int, filters: int, stride: int = 1, size: tuple = (2, 7, 6), **options) -> Any:
    n, h, w = size
    weight = images(filters, channels // options.get("groups", 1), 3, 3, seed=1)
    bias = randn(filters, dtype=BF16, seed=2)
    return kernels.conv2d(images(n, channels, h, w), weight, bias, stride, 1, **options)


def conv2d_gradients(channels: int, filters: int, size: tuple, stride: int = 1) -> None:
    """By themselves, as dy lies channels_last here."""
    n, h, w = size
    x, weight = images(n, channels, h, w), images(filters, channels, 3, 3, seed=1)
    p, q = ((side + 2 - 3) // stride + 1 for side in (h, w))
    dy, geometry = images(n, filters, p, q, seed=2), ([stride] * 2, [1, 1], [1, 1], 1)
    torch.ops.tilelab.conv2d_input_grad(dy, weight, list(x.shape), *geometry)
    torch.ops.tilelab.conv2d_weight_bias_grad(x, dy, weight, *geometry)


def relu_pool(channels: int, filters: int, size: tuple = (2, 8, 8), backward: bool = False) -> None:
    n, h, w = size
    x, weight = images(n, channels, h, w), images(filters, channels, 3, 3, seed=1)
    bias = randn(filters, dtype=BF16, seed=2)
    if backward:
        train(kernels.conv2d_relu_pool, x, weight, bias, padding=1)
    else:
        kernels.conv2d_relu_pool(x, weight, bias, 1)


def optimizer_steps(make: Callable, **options: Any) -> None:
    """Two parameters, of which one does not fill a block; the second step has all its state."""
    parameters = [torch.nn.Parameter(randn(n, seed=n)) for n in (300, 7)]
    optimizer = make(parameters, **options)
    for seed in (5, 6):
        for p in parameters:
            p.grad = randn(*p.shape, seed=seed)
        optimizer.step()


def cross_entropy(columns: int) -> None:
    target = torch.tensor([3, 0, columns - 1, -100, 7, 5])
    train(
        lambda x: kernels.cross_entropy(x, target, label_smoothing=0.1, reduction="sum"),
        randn(6, columns),
    )


GROUP = dict(GROUP_M=8)
ROWS = dict(BLOCK_M=4, BLOCK_N=64, num_warps=4)
PIXELS = dict(BLOCK_M=8, BLOCK_N=16, num_warps=2)
_TMA = functools.partial(_tiles.tma_tile, warps=4, stages=3, per_sm=1, SPLIT_K=1)
_MATMUL_TMA = functools.partial(_TMA, m=64, n=32, k=64, **GROUP)

CASES = {
    "matmul": Case(
        "sm_80", lambda: matmul(40, 48, 208), ("matmul_kernel",),
        dict(matmul=pointer(32, 32, 32, 2, **GROUP)),
    ),
    "matmul, transposed, not aligned": Case(
        "sm_80", lambda: matmul_of_columns(40, 24, 200), ("matmul_kernel",),
        dict(matmul=pointer(32, 16, 32, 2, **GROUP)),
    ),
    "matmul, float32": Case(
        "sm_80", lambda: matmul(20, 24, 100, F32), ("matmul_kernel",),
        dict(matmul=pointer(16, 16, 16, 2, **GROUP)),
    ),
    "matmul, TF32": Case(
        "sm_80", lambda: matmul(40, 24, 100, F32), ("matmul_kernel",),
        dict(matmul=pointer(32, 16, 16, 2, **GROUP)), "tf32",
    ),
    "scaled_matmul, int8": Case(
        "sm_80", lambda: scaled_matmul(40, 24, 400, torch.int8), ("scaled_matmul_kernel",),
        dict(scaled_matmul=pointer(32, 16, 64, 2, **GROUP)),
    ),
    "conv2d and its gradients": Case(
        "sm_80", lambda: (conv2d(48, 32, 2), conv2d_gradients(48, 32, (3, 11, 8), 2)),
        ("conv2d_kernel", "conv2d_input_grad_kernel", "conv2d_weight_grad_kernel"),
        dict(conv2d=pointer(16, 16, 32, 2), conv2d_input_grad=pointer(16, 16, 16, 2),
             conv2d_weight_grad=pointer(16, 16, 16, 2)),
    ),
    "conv2d, few channels": Case(
        "sm_80", lambda: conv2d(5, 24, 2), ("conv2d_flat_kernel",),
        dict(conv2d_flat=pointer(16, 16, 16, 2, 2)),
    ),
    "conv2d, depthwise": Case(
        "sm_80", lambda: conv2d(20, 20, groups=20), ("conv2d_depthwise_kernel",),
        dict(conv2d_depthwise=PIXELS | dict(PATCH_P=1, PATCH_Q=4, ROWS=2)),
    ),
    "conv2d_relu_pool and its gradients": Case(
        "sm_80", lambda: relu_pool(16, 32, (2, 14, 10), backward=True),
        ("conv2d_relu_pool_kernel", "conv2d_relu_pool_input_grad_kernel",
         "conv2d_relu_pool_weight_grad_kernel"),
        dict(conv2d_relu_pool=pointer(16, 16, 32), conv2d_relu_pool_input_grad=pointer(16, 16, 32),
             conv2d_relu_pool_weight_grad=pointer(16, 16, 16)),
    ),
    "conv2d_relu_pool, scattered": Case(
        "sm_80", lambda: relu_pool(20, 24, (2, 9, 8), backward=True), ("unpool_kernel",),
        dict(unpool=dict(kernel="unpool", BLOCK_M=8, BLOCK_N=16, num_warps=2)),
    ),
    "im2col": Case(
        "sm_80",
        lambda: train(kernels.im2col, images(2, 5, 6, 7), kernel_size=3, stride=2, padding=1),
        ("im2col_kernel", "col2im_kernel"), dict(im2col=PIXELS, col2im=PIXELS),
    ),
    "max_pool2d": Case(
        "sm_80",
        lambda: train(kernels.max_pool2d, images(2, 20, 9, 8), kernel_size=3, stride=2, padding=1),
        ("max_pool2d_kernel", "max_pool2d_backward_kernel"),
        dict(max_pool2d=PIXELS, max_pool2d_backward=PIXELS),
    ),
    "softmax": Case(
        "sm_80", lambda: train(kernels.softmax, randn(3, 1000)),
        ("softmax_kernel", "softmax_backward_kernel"),
        dict.fromkeys(("softmax", "softmax_backward"), dict(BLOCK_M=1, BLOCK_N=1024, num_warps=4)),
    ),
    "softmax, online": Case(
        "sm_80", lambda: train(kernels.softmax, randn(6, 300)),
        ("softmax_online_kernel", "softmax_backward_online_kernel"),
        dict(softmax=ROWS, softmax_backward=ROWS),
    ),
    "cross_entropy": Case(
        "sm_80", lambda: cross_entropy(50),
        ("cross_entropy_kernel", "cross_entropy_backward_kernel"),
        dict(cross_entropy=ROWS, cross_entropy_backward=ROWS),
    ),
    "cross_entropy, online": Case(
        "sm_80", lambda: cross_entropy(300), ("cross_entropy_online_kernel",),
        dict(cross_entropy=ROWS, cross_entropy_backward=ROWS),
    ),
    "bias_activation": Case(
        "sm_80",
        lambda: train(kernels.bias_relu, randn(30, 40, dtype=BF16), randn(40, dtype=BF16, seed=1)),
        ("bias_activation_kernel", "bias_activation_backward_kernel", "sum_partials_kernel"),
        dict.fromkeys(
            ("bias_relu", "bias_relu_backward"), dict(BLOCK_M=8, BLOCK_N=32, num_warps=2)
        ),
    ),
    "optimizers": Case(
        "sm_80",
        lambda: (
            optimizer_steps(kernels.SGD, lr=0.1, momentum=0.9, nesterov=True),
            optimizer_steps(kernels.AdamW),
        ),
        ("sgd_kernel", "adamw_kernel"),
        dict.fromkeys(("sgd", "adamw"), dict(BLOCK_M=128, num_warps=2)),
    ),
    "matmul by pointers": Case(
        "sm_90", lambda: matmul(72, 32, 272), ("matmul_kernel",),
        dict(matmul=pointer(64, 16, 64, **GROUP)),
    ),
    "matmul by TMA": Case(
        "sm_90", lambda: matmul(136, 72, 328), ("matmul_tma_kernel",),
        dict(matmul=_MATMUL_TMA(SUBTILES=2)),
    ),
    "matmul by TMA, transposed, in parts": Case(
        "sm_90", lambda: matmul_of_columns(136, 72, 584),
        ("matmul_tma_kernel", "matmul_reduce_kernel"),
        dict(matmul=_MATMUL_TMA(SUBTILES=1, SPLIT_K=2)),
    ),
    "matmul by TMA, warp-specialised": Case(
        "sm_90", lambda: matmul(264, 72, 264), ("matmul_tma_kernel",),
        dict(matmul=_MATMUL_TMA(m=128, n=64, SUBTILES=1, stages=2, kernel="tma_ws")),
    ),
    "conv2d by TMA": Case(
        "sm_90", lambda: conv2d(72, 72, size=(2, 9, 8), activation="relu"), ("conv2d_tma_kernel",),
        dict(conv2d=_TMA(m=64, n=64, k=64)),
    ),
    "gradients of conv2d by TMA": Case(
        "sm_90", lambda: conv2d_gradients(16, 72, (20, 4, 3)),
        ("conv2d_input_grad_tma_kernel", "conv2d_weight_grad_tma_kernel"),
        dict(conv2d_input_grad=_TMA(m=64, n=64, k=64),
             conv2d_weight_grad=_TMA(m=64, n=64, k=16, SUBTILES=1)),
    ),
    "conv2d_relu_pool by TMA": Case(
        "sm_90", lambda: relu_pool(72, 80), ("conv2d_tma_kernel",),
        dict(conv2d_relu_pool=_TMA(m=64, n=64, k=64)),
    ),
    "scaled_matmul by TMA, float8": Case(
        "sm_90", lambda: scaled_matmul(136, 72, 656, torch.float8_e4m3fn),
        ("scaled_matmul_tma_kernel",),
        dict(scaled_matmul=_tiles.tma_tile(m=64, n=32, k=128, warps=4, stages=3, per_sm=1,
                                           SUBTILES=1, **GROUP)),
    ),
}  # fmt: skip

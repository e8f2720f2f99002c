"""Triton's compiler for a GPU that is not here, as far as PTX.

Triton compiles a kernel in stages: TTIR, TTGIR, LLVM IR, PTX, and at last machine code, which
NVIDIA's program ptxas makes. The machine executes PTX, so the last stage is left out: what stands
for the machine code is the PTX itself. Triton keeps what it has compiled in its cache, by a key of
which the backend's `hash` is a part. That is changed too, or a GPU would be given such a kernel.
"""

import contextlib
import itertools
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.errors import OutOfResources

from tilelab.perf.errors import PerfError

# Shared memory that a CTA can have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
THREADS = 1024  # of a CTA


@contextlib.contextmanager
def compiling(target: str) -> Iterator[None]:
    """Within this context `@triton.jit` compiles for `target`, and ends with PTX.

    Raises:
        PerfError: the target is unknown, or this process interprets kernels.
    """
    if target not in SHARED:
        raise PerfError(f"target must be {' or '.join(SHARED)}, got {target!r}")
    if triton.knobs.runtime.interpret:
        raise PerfError(
            "this process interprets kernels, and an interpreted kernel has no PTX: "
            "set TRITON_INTERPRET=0 in the environment before python starts"
        )
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    with (
        mock.patch.object(triton.runtime.driver, "_active", _driver(gpu)),
        mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode()),
        mock.patch.object(CUDABackend, "hash", lambda self: f"PTX only, {self.target.arch}"),
    ):
        yield


def _driver(gpu: GPUTarget) -> types.SimpleNamespace:
    """What the JIT and the autotuner ask the driver of a GPU."""
    return types.SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: f"PTX only, {gpu.arch}",  # a kernel keeps its code by device
        get_current_stream=lambda device: 0,
        set_current_device=lambda device: None,
        get_active_torch_device=lambda: torch.device("cpu"),
        get_benchmarker=_benchmarker,
    )


def _benchmarker() -> Any:
    """What an autotuner times its configurations by: each is slower than the one before it.

    The machine has no time, so the first configuration is taken, and none is run for it.
    """
    order = itertools.count(1)
    return lambda call, quantiles=None, **_: [float(next(order))] * len(quantiles or [0])


def check_resources(name: str, metadata: Any, target: str) -> None:
    """Raise what Triton would raise on a GPU, if a CTA of this kernel does not fit an SM."""
    if metadata.shared > SHARED[target]:
        raise OutOfResources(metadata.shared, SHARED[target], "shared memory")
    if 32 * metadata.num_warps > THREADS:
        raise OutOfResources(32 * metadata.num_warps, THREADS, "threads")
    if metadata.num_ctas != 1:
        raise PerfError(f"{name} runs in clusters of {metadata.num_ctas} CTAs: not supported")

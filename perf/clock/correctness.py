"""The gate: is a result right? Only right results are timed, and finalists are checked again later.

The inputs are random and fresh. The reference is computed in float64, and the error is relative, in
the 2-norm. What the kernels allocate is first filled with NaN, which shows elements that nobody
wrote. Sums of the inputs, before and after, show whether a kernel wrote to them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tilelab.perf.work import workloads
from tilelab.perf.work.workloads import Workload


class Verdict(NamedTuple):
    """`error` is the relative norm, nan where there is none; `problem` is None if all is right."""

    error: float
    tolerance: float
    problem: str | None


class Gate:
    """The inputs of one seed and the reference's results, to hold implementations against."""

    def __init__(self, w: Workload, device: str, seed: int) -> None:
        self.w, self.device, self.seed = w, device, seed
        with workloads.cudnn_benchmark(False):  # once is not worth a search
            self.expected = [t.detach() for t in workloads.prepare(w, "reference", device, seed)()]

    def check(self, call: Callable[[], tuple], impl: str = "tilelab") -> Verdict:
        """Do `call` once, made by `workloads.prepare` with this gate's seed, and judge it.

        Peers are not poisoned: that needs torch's deterministic mode, in which cuDNN chooses others
        of its algorithms and torch.compile compiles again. What is judged is what is timed.
        """
        before = [_checksum(x) for x in call.inputs]
        with poisoned() if impl == "tilelab" else contextlib.nullcontext():
            got = [t.detach() for t in call()]
        changed = before != [_checksum(x) for x in call.inputs]
        worst, bound, problem = 0.0, 0.0, None
        if len(got) != len(self.expected):
            problem = f"{len(got)} results instead of {len(self.expected)}"
        for i, (y, ref) in enumerate(zip(got, self.expected, strict=False)):
            limit = workloads.tolerance(self.w, ref.numel(), impl)
            if y.shape != ref.shape:
                problem = f"result {i} has shape {list(y.shape)}, expected {list(ref.shape)}"
                continue
            error = relative_error(y, ref)
            if not error <= limit:  # NaN too
                wrong = f"result {i} is wrong: relative error {error:.3g} > {limit:.3g}"
                problem = problem or wrong
            if not error <= worst:
                worst, bound = error, limit
        if changed:
            problem = "it changes its inputs"
        return Verdict(worst, bound or workloads.tolerance(self.w, 1, impl), problem)


def relative_error(got: torch.Tensor, ref: torch.Tensor) -> float:
    """||got - ref|| / ||ref|| in float64; of an all-zero reference, ||got||."""
    scale = torch.linalg.vector_norm(ref, dtype=torch.float64).item()
    return torch.linalg.vector_norm(got.double() - ref).item() / (scale or 1.0)


def _checksum(x: torch.Tensor) -> int:
    """A sum of the bits of a tensor, as integers."""
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().view(as_int).sum(dtype=torch.int64).item()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within this context torch fills with NaN what it allocates and does not initialise."""
    on = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill

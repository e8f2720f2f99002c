"""Executes the PTX of Triton kernels with no GPU."""

from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.launch import executing, run
from tilelab.perf.machine.report import Coverage, Finding, Report, statement

__all__ = [
    "Coverage", "Finding", "MachineFault", "Report", "UnknownInstruction", "executing", "run",
    "statement",
]  # fmt: skip

"""What the machine says when it cannot go on."""

from collections.abc import Callable
from typing import Any

from tilelab.perf.errors import PerfError


class UnknownInstruction(PerfError):
    """The PTX has an instruction, or a form of one, that the machine does not know."""


class MachineFault(PerfError):
    """A kernel did what no GPU allows: out of bounds, not aligned, a deadlock, half a warp."""


def refuse(what: str) -> Callable:
    """A builder, for handlers.py, of instructions that the machine knows and does not execute."""

    def build(inst: Any, core: Any) -> Callable:
        raise UnknownInstruction(f"{inst.where}: {what} not supported")

    return build

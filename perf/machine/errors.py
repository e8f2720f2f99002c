"""What the machine says when it cannot go on."""

from tilelab.perf.errors import PerfError


class UnknownInstruction(PerfError):
    """The PTX has an instruction, or a form of one, that the machine does not know."""


class MachineFault(PerfError):
    """A kernel did what no GPU allows: out of bounds, not aligned, a deadlock, half a warp."""

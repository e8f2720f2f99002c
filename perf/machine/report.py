"""What came of a launch on the machine, for people and for programs."""

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np


class Finding(NamedTuple):
    """Something that is wrong, and did not end the run.

    Attributes:
        kind: "race", "missing fence.proxy.async", "uninitialised", ...
        message: what was done.
        where: the source line and the PTX line that did it.
        other: those of the access that it has trouble with; "" if there is none.
        times: how often.
    """

    kind: str
    message: str
    where: str
    other: str
    times: int

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.message} ({self.times} x)", f"  at {self.where}"]
        return "\n".join(lines + [f"  and {self.other}"] * bool(self.other))


@dataclasses.dataclass
class Report:
    """What one launch did.

    Attributes:
        kernel: its name.
        code: the hash of its PTX: launches with other tiles or types have another.
        target: sm_80 or sm_90.
        grid: programs (CTAs) in x, y and z.
        threads: of each program.
        schedule: in which order warps ran.
        seed: of that order.
        findings: all that is wrong; empty if nothing is.
        counts: of instructions, accesses and bytes, by name (counts.py).
        executed: for each instruction of the PTX, how many warps executed it.
        seconds: that the machine took.
    """

    kernel: str
    code: str
    target: str
    grid: tuple[int, int, int]
    threads: int
    schedule: str
    seed: int
    findings: list[Finding]
    counts: dict[str, Any]
    executed: np.ndarray
    seconds: float

    @property
    def coverage(self) -> float:
        """The share of the instructions that at least one warp executed."""
        return float((self.executed > 0).mean()) if self.executed.size else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["findings"] = [finding._asdict() for finding in self.findings]
        fields["executed"] = self.executed.tolist()
        return fields | {"coverage": self.coverage}

    def __str__(self) -> str:
        order = self.schedule + f", seed {self.seed}" * (self.schedule != "lockstep")
        lines = [
            f"{self.kernel} on {self.target}: grid {self.grid}, {self.threads} threads each, "
            f"{order}, {self.seconds:.2f} s",
            f"  executed {(self.executed > 0).sum()} of {self.executed.size} instructions of the "
            f"PTX ({self.coverage:.0%})",
        ]
        width = max(map(len, self.counts), default=0)
        lines += [f"  {name:{width}}  {value:>14,}" for name, value in self.counts.items()]
        lines += [f"  {line}" for finding in self.findings for line in str(finding).splitlines()]
        return "\n".join(lines if self.findings else [*lines, "  nothing is wrong"])


class Coverage:
    """Many launches together: how often each kernel was launched, and what of it was executed."""

    def __init__(self) -> None:
        self.launches: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.findings: dict[str, int] = defaultdict(int)
        self.executed: dict[str, dict[str, np.ndarray]] = defaultdict(dict)  # by kernel and code

    def add(self, report: Report) -> None:
        """Count a launch."""
        name = report.kernel
        self.launches[name] += 1
        self.seconds[name] += report.seconds
        self.findings[name] += len(report.findings)
        before = self.executed[name].get(report.code, False)
        self.executed[name][report.code] = before | (report.executed > 0)

    def __str__(self) -> str:
        rows = [("launches", "codes", "executed", "findings", "seconds", "kernel")]
        for name in sorted(self.launches):
            codes = self.executed[name].values()
            share = sum(map(np.sum, codes)) / max(1, sum(map(len, codes)))
            rows.append((str(self.launches[name]), str(len(codes)), f"{share:.1%}",
                         str(self.findings[name]), f"{self.seconds[name]:.1f}", name))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        return "\n".join("  ".join([*cells[:-1], row[-1]]) for cells, row in zip(right, rows, strict=True))

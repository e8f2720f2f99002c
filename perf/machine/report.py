"""What came of a launch on the machine, for people and for programs."""

import dataclasses
from collections import Counter, defaultdict
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
        lines: the same by line of the source: {("matmul.py", 17): {"wavefronts": 64}}; empty where
            nothing was counted.
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
    lines: dict[tuple[str, int], dict[str, int]]
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
        fields["lines"] = [[*place, counts] for place, counts in self.lines.items()]
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
    """Many launches together: how often each kernel was launched, and what of it was executed.

    Attributes:
        totals: by kernel: launches, findings, seconds.
        executed: by kernel and by the hash of its PTX: which instructions.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Counter] = defaultdict(Counter)
        self.executed: dict[str, dict[str, np.ndarray]] = defaultdict(dict)

    def add(self, report: Report) -> None:
        """Count a launch."""
        found = dict(launches=1, findings=len(report.findings), seconds=report.seconds)
        self._add(report.kernel, found, {report.code: report.executed > 0})

    def merge(self, other: "Coverage") -> None:
        """Count the launches of another one."""
        for name, totals in other.totals.items():
            self._add(name, totals, other.executed[name])

    def _add(self, name: str, totals: dict, executed: dict[str, np.ndarray]) -> None:
        self.totals[name].update(totals)
        for code, done in executed.items():
            self.executed[name][code] = self.executed[name].get(code, False) | done

    def __str__(self) -> str:
        """A table: a kernel a line; "variants" are its different PTX, of tiles and types."""
        rows = [("launches", "variants", "executed", "findings", "seconds", "kernel")]
        for name, totals in sorted(self.totals.items()):
            done = np.concatenate(list(self.executed[name].values()))
            rows.append((
                f"{totals['launches']}", f"{len(self.executed[name])}", f"{done.mean():.1%}",
                f"{totals['findings']}", f"{totals['seconds']:.1f}", name,
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )

"""What came of a launch on the machine, for people and for programs."""

import dataclasses
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np

from tilelab.perf.machine.ptx import Instruction


class Finding(NamedTuple):
    """Something that is wrong, and did not end the run.

    Attributes:
        kind: "race", "missing fence", "uninitialised", ...
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
        executed: for each instruction of the PTX, how many warps executed it, in all runs.
        seconds: that the machine took.
        types: Triton's type of each argument, by its name: "*bf16", "i32", "constexpr".
        constants: what the kernel was compiled for, by name: BLOCK_M, num_warps, ...
        instructions: of the PTX.
        compiling: seconds of CPU time that the compiler took; hardly any if it had the PTX already.
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
    types: dict[str, Any]
    constants: dict[str, Any]
    instructions: list[Instruction]
    compiling: float = 0.0

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
        fields["constants"] = {name: str(x) for name, x in self.constants.items()}
        del fields["instructions"]
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


class Variant(NamedTuple):
    """One PTX of a kernel.

    Attributes:
        size: its instructions.
        missed: those that no launch has executed, by their index: (place, op, where).
    """

    size: int
    missed: dict[int, tuple[str, str, str]]

    @property
    def share(self) -> float:
        """Of its instructions, how many were executed."""
        return 1 - len(self.missed) / self.size if self.size else 1.0


class Coverage:
    """Many launches together: how often each kernel was launched, and what of it was executed.

    A kernel is compiled into several PTX, its *variants*: one for each tile, each type, and each
    property of the arguments that Triton makes use of. There are two shares:

        each        of a variant's instructions, those that some launch of it executed; the mean
                    over the variants
        together    of the kernel's statements (an opcode at a source line), those that some launch
                    of any variant executed

    Attributes:
        totals: by kernel: launches, findings, seconds.
        variants: by kernel, and by the hash of the PTX.
        statements: by kernel: whether a (place, op) was executed.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Counter] = defaultdict(Counter)
        self.variants: dict[str, dict[str, Variant]] = defaultdict(dict)
        self.statements: dict[str, dict[tuple[str, str], bool]] = defaultdict(dict)

    def add(self, report: Report) -> None:
        """Count a launch."""
        found = dict(launches=1, findings=len(report.findings), seconds=report.seconds)
        missed, statements = {}, {}
        for i, inst in enumerate(report.instructions):
            key, done = statement(inst), bool(report.executed[i])
            statements[key] = statements.get(key, False) or done
            if not done:
                missed[i] = (*key, inst.where)
        variant = Variant(len(report.instructions), missed)
        self._add(report.kernel, found, {report.code: variant}, statements)

    def merge(self, other: "Coverage") -> None:
        """Count the launches of another one."""
        for name, totals in other.totals.items():
            self._add(name, totals, other.variants[name], other.statements[name])

    def _add(
        self, name: str, totals: dict, variants: dict[str, Variant],
        statements: dict[tuple[str, str], bool],
    ) -> None:  # fmt: skip
        self.totals[name].update(totals)
        for code, new in variants.items():
            old = self.variants[name].get(code, new).missed
            missed = {i: what for i, what in new.missed.items() if i in old}
            self.variants[name][code] = Variant(new.size, missed)
        for key, done in statements.items():
            self.statements[name][key] = self.statements[name].get(key, False) or done

    def each(self, name: str) -> float:
        """The mean share of a kernel's variants."""
        return float(np.mean([variant.share for variant in self.variants[name].values()]))

    def together(self, name: str) -> float:
        """The share of a kernel's statements, of all variants together."""
        return float(np.mean(list(self.statements[name].values())))

    def missed(self, name: str) -> list[str]:
        """What was not executed: a source line a line, with its opcodes, the most missed first."""
        lines: dict[str, Counter] = defaultdict(Counter)
        examples: dict[str, str] = {}
        codes: dict[str, set[str]] = defaultdict(set)
        for code, variant in self.variants[name].items():
            for place, op, where in variant.missed.values():
                lines[place][op] += 1
                codes[place].add(code)
                examples.setdefault(place, where)
        order = sorted(lines, key=lambda place: -lines[place].total())
        return [
            f"{place}: {lines[place].total()} instructions of {len(codes[place])} variants ("
            + ", ".join(op for op, _ in lines[place].most_common(3))
            + f"), such as {examples[place].rpartition('(')[2].rstrip(')')}"
            for place in order
        ]

    def __str__(self) -> str:
        """A table: a kernel a line."""
        rows = [("launches", "variants", "each", "together", "findings", "seconds", "kernel")]
        for name, totals in sorted(self.totals.items()):
            rows.append((
                f"{totals['launches']}", f"{len(self.variants[name])}", f"{self.each(name):.1%}",
                f"{self.together(name):.1%}", f"{totals['findings']}", f"{totals['seconds']:.1f}",
                name,
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )


def statement(inst: Instruction) -> tuple[str, str]:
    """What an instruction is in every variant of a kernel: where it comes from, and its opcode."""
    if not inst.source:
        return "no source line", inst.op
    file, line = inst.source[0]
    return f"{file.rpartition('/')[2]}:{line}", inst.op

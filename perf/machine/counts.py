"""Counts what compiling cannot tell: what memory had to do for the accesses of a kernel.

A warp's access is one *request*. What it costs depends on where its 32 addresses lie:

    global memory   in sectors of 32 bytes. A request of 32 neighbouring floats touches 4 of them;
                    with a stride of 32 bytes or more it touches 32, and 7/8 of the traffic is waste
    shared memory   in 32 banks, word i (of 4 bytes) in bank i % 32. Each bank gives one word at a
                    time: a *wavefront*. Lanes that want one and the same word share it; two words
                    of one bank take two wavefronts (a bank conflict)

    8 bytes a lane are served to half a warp at a time, 16 bytes to a quarter; ldmatrix and stmatrix
    to the 8 rows of a matrix. Ideal is one wavefront for each of these turns. cp.async has both
    kinds: it reads sectors, and writes shared memory as a store of as many bytes would.

Sources: CUDA C++ Programming Guide, "Shared Memory" of the compute capabilities; Nsight Compute's
"Memory Tables".
"""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from tilelab.perf.machine.ptx import Instruction, Place

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core, Unit


class Counts:
    """Counters of each instruction, by its index: {12: Counter(requests=8, ...)}.

    Keys: "requests" and "bytes" of an access; of global memory "sectors" and "sectors, ideal"; of
    shared memory "wavefronts" and "wavefronts, ideal"; "TMA bytes"; "waits", lanes that had to wait
    at an mbarrier. The requests and bytes of cp.async are those to global memory.
    """

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.of: dict[int, Counter] = defaultdict(Counter)

    def add(self, inst: Instruction, name: str, amount: int) -> None:
        """Count something else for an instruction."""
        self.of[self.core.index(inst)][name] += int(amount)

    def access(
        self, inst: Instruction, space: str, unit: "Unit", lanes: np.ndarray, offsets: np.ndarray,
        size: int,
    ) -> None:  # fmt: skip
        """One access of `size` bytes by each of these lanes."""
        if lanes.size == 0:
            return
        found = self.of[self.core.index(inst)]
        warp = lanes // 32
        found["requests"] += _distinct(warp).size
        found["bytes"] += lanes.size * size
        if space == "global":
            found["sectors"] += _touched(warp, offsets, size, 32)[0].size
            bytes_ = np.bincount(_touched(warp, offsets, size, 1)[0])
            found["sectors, ideal"] += int((-(-bytes_ // 32)).sum())
        else:
            self.wavefronts(inst, lanes, offsets, size)

    def wavefronts(
        self, inst: Instruction, lanes: np.ndarray, offsets: np.ndarray, size: int
    ) -> None:
        """Only what shared memory has to do: cp.async is a request to global memory as well."""
        found = self.of[self.core.index(inst)]
        phase = lanes // 32 * 4 + lanes % 32 * max(size, 4) // 128
        owner, word = _touched(phase, offsets, size, 4)
        found["wavefronts, ideal"] += _distinct(phase).size
        found["wavefronts"] += int(_most(owner, word % 32))

    @property
    def by_line(self) -> dict[Place, Counter]:
        """The counters of each line of the source, with "instructions" that warps executed."""
        lines: dict[Place, Counter] = defaultdict(Counter)
        if not self.core.counting:
            return lines
        for i, inst in enumerate(self.core.instructions):
            place = inst.source[0] if inst.source else ("", 0)
            lines[place]["instructions"] += int(self.core.executed[i])
            lines[place].update(self.of.get(i, {}))
        return dict(lines)

    @property
    def total(self) -> Counter:
        """All counters together: instructions that warps executed, accesses by memory."""
        total: Counter = Counter()
        for i, inst in enumerate(self.core.instructions):
            executed = int(self.core.executed[i])
            total["instructions"] += executed
            total[f"instructions: {kind(inst)}"] += executed
            space = "global " if "sectors" in self.of.get(i, {}) else "shared "
            for name, amount in self.of.get(i, {}).items():
                total[(space if name in ("requests", "bytes") else "") + name] += amount
        return +total


KINDS = {
    "tensor cores": ("mma", "wgmma.mma_async"),
    "shared memory": ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "atom.shared"),
    "global memory": ("ld.global", "st.global", "atom.global", "red.global"),
    "asynchronous copies": ("cp.async",),
    "barriers and waits": ("bar", "mbarrier", "wgmma", "fence"),
    "branches": ("bra", "ret", "exit"),
    "conversions and moves": ("cvt", "mov", "prmt", "selp", "shfl"),
    "parameters": ("ld.param",),
}


def kind(inst: Instruction) -> str:
    """A name for what an instruction does."""
    for name, prefixes in KINDS.items():
        if inst.op.startswith(prefixes):
            return name
    floats = inst.parts[-1] in ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")
    return "float arithmetic" if floats else "integer arithmetic"


def _touched(owner: np.ndarray, offsets: np.ndarray, size: int, unit: int) -> tuple:
    """Which pieces of `unit` bytes each owner touches, each once: (owners, pieces)."""
    step = np.arange(0, max(size, unit), unit)
    pieces = (offsets[:, None] + step) // unit
    keys = _distinct((owner[:, None].astype(np.int64) << 40) + pieces)
    return keys >> 40, keys & ((1 << 40) - 1)


def _most(owner: np.ndarray, bank: np.ndarray) -> int:
    """The most words of one bank that each owner wants, summed over owners."""
    wanted = np.bincount(owner * 32 + bank)
    return int(np.pad(wanted, (0, -wanted.size % 32)).reshape(-1, 32).max(1).sum())


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Each key once. NumPy's np.unique takes several times as long for so few."""
    keys = np.sort(keys, axis=None)
    return keys[np.r_[True, keys[1:] != keys[:-1]]]

"""Units: the threads of one or several CTAs that are scheduled together, and their registers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tilelab.perf.machine.core import Core

FREE, SPINS, WAITS, DONE = range(4)  # what a lane does
SPECIAL = ("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x",
           "%nctaid.y", "%nctaid.z", "%ntid.x", "%laneid", "%warpid", "%clock", "%globaltimer",
           "%smid", "%nsmid")  # fmt: skip


class Unit:
    """Lanes that are scheduled together, in the order [CTA, warp, lane of the warp].

    Attributes:
        n: how many lanes.
        warps: the indices in their CTA of its warps.
        lanes: 0 to n - 1.
        thread, cta, gid: each lane's thread in its CTA, its CTA in the batch, and both in one.
        views: the registers, see `Core.slot`.
        at: the block where each lane is.
        doing: FREE, SPINS at an mbarrier, WAITS at a barrier, or DONE.
        state: for what handlers keep for each unit.
    """

    def __init__(self, core: "Core", warps: Sequence[int], ctas: int) -> None:
        self.warps = tuple(warps)
        threads = (np.array(self.warps)[:, None] * 32 + np.arange(32)).ravel()
        self.n = ctas * threads.size
        self.lanes = np.arange(self.n)
        self.thread = np.tile(threads, ctas)
        self.cta = np.repeat(np.arange(ctas), threads.size)
        self.gid = self.cta * core.threads + self.thread
        # All registers are one piece of memory, except predicates, which are another.
        types = {name: core.type_of(name) for name, *_ in core.slots}
        room = sum(bits.itemsize for bits in types.values() if bits.kind != "b")
        self.raw = np.empty(self.n * room, np.uint8)
        self.predicates = np.empty((sum(bits.kind == "b" for bits in types.values()), self.n), bool)
        self.registers: dict[str, np.ndarray] = {}
        at, predicates = 0, iter(self.predicates)
        for name, bits in sorted(types.items(), key=lambda item: -item[1].itemsize):  # aligned
            if bits.kind == "b":
                self.registers[name] = next(predicates)
            else:
                end = at + self.n * bits.itemsize
                self.registers[name] = self.raw[at:end].view(bits)
                at = end
        self.views = [self._view(*slot) for slot in core.slots]
        self.state: dict[Any, Any] = {}
        self.at = np.zeros(self.n, np.int32)
        self.doing = np.zeros(self.n, np.int8)
        self.together = True  # all lanes are FREE, and at one block
        self.able = True  # some lane is FREE

    def _view(self, name: str, dtype: np.dtype, part: tuple[int, int]) -> np.ndarray:
        whole = self.registers[name].view(dtype)
        index, count = part
        return whole if count == 1 else whole.reshape(self.n, count)[:, index]

    def begin(self) -> None:
        """Be at the beginning, with registers that hold nothing."""
        self.raw.fill(0xFF)
        self.predicates.fill(False)
        self.at[:], self.doing[:], self.together, self.able = 0, FREE, True, True
        self.state.clear()

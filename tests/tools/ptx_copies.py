"""Small PTX programs of two tensors, x and y, for the tests of copies and mbarriers.

The tests change such a program: they leave out a line or change it, and the machine has to say so.
"""

import numpy as np
import pytest

from tests.tools import ptx_programs
from tilelab.perf.machine.copies.tensor_maps import TensorMap
from tilelab.perf.machine.core import SCHEDULES

MAP_X, MAP_Y = 1 << 20, 2 << 20  # addresses of tensor maps
# %r1 is the thread, %r2 where shared memory begins and %r3 the thread's 16 bytes of it; %rd1 and
# %rd2 are x and y, %rd6 and %rd7 the thread's 16 bytes of them; %rd3 and %rd4 are their maps.
BEGIN = f"""
    mov.b64 %rd2, %rd1;
    mov.b64 %rd1, %rd0;
    mov.b64 %rd3, {MAP_X};
    mov.b64 %rd4, {MAP_Y};
    mov.u32 %r1, %r0;
    mov.b32 %r2, global_smem;
    setp.eq.u32 %p1, %r1, 0;
    mul.wide.u32 %rd5, %r1, 16;
    add.s64 %rd6, %rd1, %rd5;
    add.s64 %rd7, %rd2, %rd5;
    shl.b32 %r3, %r1, 4;
    add.s32 %r3, %r3, %r2;
"""


class Run:
    """A kernel that was run: x and y as it leaves them, and what the machine found."""

    def __init__(self, body, x, y, box_x=None, box_y=None, threads=64, ctas=1, **options):
        self.x, self.y = x.copy(), y.copy()

        def maps(addresses):
            given = zip((MAP_X, MAP_Y), (box_x, box_y), addresses, (x, y), strict=True)
            return {place: map_of(at, tensor, *box) for place, box, at, tensor in given if box}

        self.core = ptx_programs.run(
            BEGIN + body, self.x, self.y, threads=threads, grid=(ctas,), shared=4096, maps=maps,
            **options,
        )  # fmt: skip

    @property
    def kinds(self):
        """What kinds of findings there are."""
        return set(ptx_programs.findings(self.core))


def map_of(address, tensor, box, swizzle=0, shape=None):
    """The map of a tensor; box and shape are outermost first, like the tensor's own."""
    shape = (shape or tensor.shape)[::-1]
    return TensorMap(address, shape, tensor.strides[-2::-1], box[::-1], tensor.itemsize, swizzle)


def numbers(*shape, dtype=np.int32):
    """Numbers that are all different."""
    return np.arange(1, np.prod(shape) + 1, dtype=dtype).reshape(shape)


def without(body, text):
    """The kernel without the only line that has this text."""
    lines = body.splitlines()
    assert sum(text in line for line in lines) == 1, text
    return "\n".join(line for line in lines if text not in line)


schedules = pytest.mark.parametrize("schedule", SCHEDULES)

# Wait at the mbarrier at this address, until a phase of this parity is complete.
WAIT = """
    {{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2 + {at}], {parity};
    @!complete bra.uni waitLoop;
    }}
"""


def inst_of(counts, index):
    """The text of an instruction that was counted."""
    return counts.core.instructions[index].text

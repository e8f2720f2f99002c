"""A few warps on which a test tries single instructions: it sets registers and bytes, and looks."""

import numpy as np

from tilelab.perf.machine import core, handlers, memory, ptx, units

BITS = {"%r": ("b32", "u4"), "%rd": ("b64", "u8"), "%p": ("pred", "?")}
HEAD = """
.visible .entry kernel(.param .u64 kernel_param_0) .reqntid {threads}, 1, 1
{{
.reg .b32 %r<600>; .reg .b64 %rd<20>; .reg .pred %p<4>;
{body}
ret;
}}
"""


class Warps:
    """Two CTAs, or more, side by side in one unit.

    `body` is PTX. step() executes its next instruction, run() all that are left.
    """

    def __init__(self, body, threads=128, ctas=2, shared=4096):
        program = ptx.parse(HEAD.format(threads=threads, body=body))
        self.core = core.Core(program, (ctas,), {}, shared, memory.GlobalMemory([]))
        self.steps = [
            handlers.find(inst.op)(inst, self.core)
            for inst in self.core.instructions
            if inst.op != "ret"
        ]
        self.unit = units.Unit(self.core, range(threads // 32), ctas)
        self.core.units = [self.unit]
        self.stride = self.core.shared.stride
        self.done = 0

    def __setitem__(self, name, bits):
        """Set a register: one value for all lanes, or one for each."""
        kind = BITS[name.rstrip("0123456789")]
        values = np.broadcast_to(np.asarray(bits), self.unit.n).astype(kind[1])
        if name not in self.unit.registers:
            self.unit.registers[name] = values.copy()
        else:
            self.unit.registers[name][:] = values

    def __getitem__(self, name):
        return self.unit.registers[name]

    def fill(self, first, values):
        """Set registers %r<first> on, [registers, lanes]."""
        for i, row in enumerate(values):
            self[f"%r{first + i}"] = row

    def show(self, first, count):
        """Registers %r<first> on: [registers, lanes]."""
        return np.stack([self[f"%r{first + i}"] for i in range(count)])

    def write_shared(self, address, raw, cta=None):
        """Put bytes into the shared memory of one CTA, or of all."""
        shared = self.core.shared
        for c in range(self.core.ctas) if cta is None else [cta]:
            at = np.asarray(address) + c * self.stride
            shared.bytes[at] = raw
            shared.initialised[at] = True

    def step(self, mask=None):
        with np.errstate(all="ignore"):
            self.steps[self.done](self.unit, mask)
        self.done += 1

    def run(self, mask=None):
        while self.done < len(self.steps):
            self.step(mask)
        return self

    def barrier(self):
        self.core.races.barrier(self.unit.gid.reshape(self.core.ctas, -1))

    @property
    def found(self):
        """The kinds of what was reported."""
        return {kind for kind, *_ in self.core.findings}


def registers(first, count):
    """{%r4, %r5, ...} as PTX writes it."""
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"

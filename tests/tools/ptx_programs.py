"""Small PTX programs, written by hand, on the machine: one instruction or two, and what they do.

    run("add.u32 %r3, %r1, %r2; st.global.b32 [%rd1], %r3;", y)

`%rd0`, `%rd1` ... are the addresses of the arrays, `%r0` is %tid.x, `%r1` is %ctaid.x; the rest are
free. `%rd20 + i` is no array's: it is free, too.
"""

import numpy as np

from tilelab.perf.machine import core, memory, ptx

REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<300>;
    .reg .b64 %rd<40>;
"""


def text(body, arrays=0, threads=32, more=""):
    """The PTX of a kernel with this body."""
    parameters = ",\n".join(f".param .u64 kernel_param_{i}" for i in range(arrays))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [kernel_param_{i}];" for i in range(arrays))
    return (
        f".version 8.4\n.target sm_90a\n.address_size 64\n"
        f".extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry kernel(\n{parameters}\n)\n.reqntid {threads}\n{more}\n{{\n{REGISTERS}\n"
        f"{loads}\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\n{body}\nret;\n}}\n"
    )


def run(body, *arrays, threads=32, grid=(1,), shared=1024, more="", maps=None, **options):
    """Run it; the arrays are changed. Returns the Core.

    `maps` gives tensor maps by their addresses, from the addresses of the arrays.
    """
    program = ptx.parse(text(body, len(arrays), threads, more))
    where = memory.GlobalMemory([a.nbytes for a in arrays])
    at = [where.place(a.reshape(-1).view(np.uint8), f"array {i}") for i, a in enumerate(arrays)]
    given = {p.name: np.uint64(x) for p, x in zip(program.parameters, at, strict=True)}
    machine = core.Core(program, grid, given, shared, where, maps(at) if maps else None, **options)
    try:
        machine.run()
    finally:
        for array, begin in zip(arrays, at, strict=True):
            offset = begin - where.base
            raw = where.bytes[offset : offset + array.nbytes]
            array.reshape(-1).view(np.uint8)[:] = raw
    return machine


def findings(machine):
    """The kinds of what was found, without repetition."""
    return sorted({kind for kind, *_ in machine.findings})


def by_thread(body, threads=32, dtype=np.uint32, **options):
    """What each thread has in %r2 at the end (%rd2, %rs2 for wider and narrower dtypes)."""
    y = np.zeros(threads, dtype)
    size = y.itemsize
    register = {8: "%rd2", 4: "%r2", 2: "%rs2"}[size]
    store = f"mul.wide.u32 %rd21, %r0, {size}; add.s64 %rd22, %rd0, %rd21;"
    machine = run(
        f"{body}\n{store} st.global.b{8 * size} [%rd22], {register};", y, threads=threads, **options
    )
    return y, machine

"""wgmma against the tables of the PTX ISA and of CUTLASS, written down as they have them.

A test places a matrix into shared memory element by element, by the ISA's table of canonical
layouts, writes the descriptor by the ISA's table of its bits, and lets the machine multiply.
Products of small integers are exact, so the result must be torch.matmul's to the last bit.
"""

import re

import numpy as np
import pytest
import torch

from tests.perf.machine.test_tensor_cores import SIZE, decode, encode, small
from tests.tools.ptx_warps import HEAD, Warps, registers
from tilelab.perf.machine import ptx
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.tensor import matrix_descriptors, wgmma, wgmma_fences

# PTX ISA 9.0, 9.7.15.5.1.2.1.3, "Canonical Layouts": CuTe layouts, strides in elements. The bytes
# of the swizzle are those of the second column, whose Swizzle<b, 4, 3> follows from them.
CANONICAL = {
    ("MN", 0): "((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))",
    ("MN", 32): "((T,2,m),(8,k)):((1,T,LBO),(2T,SBO))",
    ("MN", 64): "((T,4,m),(8,k)):((1,T,LBO),(4T,SBO))",
    ("MN", 128): "((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))",
    ("K", 0): "((8,m),(T,2k)):((1T,SBO),(1,LBO))",
    ("K", 32): "((8,m),(T,2k)):((2T,SBO),(1,T))",
    ("K", 64): "((8,m),(T,2k)):((4T,SBO),(1,T))",
    ("K", 128): "((8,m),(T,2k)):((8T,SBO),(1,T))",
}
BITS = {0: 0, 128: 1, 64: 2, 32: 3}  # 9.7.15.5.1.2.2: swizzle bytes -> bits 63-62
BOUNDARY = {0: 16, 128: 1024, 64: 512, 32: 256}  # the same: where the repeating pattern starts

# PTX ISA 9.0, 5.5.7, "Swizzling Modes": which 16 bytes lie in each cell; lines of 128 bytes.
PATTERN = {
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: ["01234567", "10325476", "23016745", "32107654",
          "45670123", "54761032", "67452301", "76543210"],
}  # fmt: skip

# CUTLASS, include/cute/atom/mma_traits_sm90_gmma.hpp: (thread, value) -> m + 64 * n (or k), the
# ISA's figures 148 to 153 as (shape, stride) of the thread and of the value. "N/8" is n / 8.
C_LAYOUT = ((4, 8, 4), (128, 1, 16)), ((2, 2, "N/8"), (64, 8, 512))
A_LAYOUT = {
    4: (((4, 8, 4), (64, 1, 16)), ((2, 2), (8, 256))),
    2: (((4, 8, 4), (128, 1, 16)), ((2, 2, 2), (64, 8, 512))),
    1: (((4, 8, 4), (256, 1, 16)), ((4, 2, 2), (64, 8, 1024))),
}
KINDS = [("f32", "bf16", "bf16"), ("f32", "f16", "f16"), ("f16", "f16", "f16"),
         ("f32", "tf32", "tf32"), ("s32", "s8", "s8"), ("s32", "u8", "s8"),
         ("f32", "e4m3", "e4m3"), ("f32", "e5m2", "e4m3"), ("f16", "e4m3", "e5m2")]  # fmt: skip
RNG = np.random.default_rng(11)


def layout(kind, t, lbo, sbo):
    """A canonical layout as a function (mn, k) -> elements: arrays of coordinates."""
    value = {"T": t, "LBO": lbo, "SBO": sbo}

    def number(text):
        factor, name = re.match(r"(\d*)(\w*)$", text).groups()
        return int(factor or 1) * value[name] if name else int(factor)

    shape, stride = kind.split("):(")
    modes = [[m.split(",") for m in re.findall(r"\(([^()]+)\)", part + ")")]
             for part in (shape, "(" + stride)]  # fmt: skip

    def one(coordinate, shape, stride):
        total = 0
        for i, step in enumerate(stride):
            if i + 1 == len(shape):  # m, k or 2k: as many as there are
                return total + coordinate * number(step)
            total = total + coordinate % number(shape[i]) * number(step)
            coordinate = coordinate // number(shape[i])

    (mn_shape, k_shape), (mn_stride, k_stride) = modes
    return lambda mn, k: one(mn, mn_shape, mn_stride) + one(k, k_shape, k_stride)


def address_of(start, elements, size, swizzle):
    """Byte addresses [...], the pattern of 5.5.7 looked up cell by cell."""
    address = start + elements * size
    if not swizzle:
        return address
    cells = np.array([[row.index(str(c)) for c in range(8)] for row in PATTERN[swizzle]])
    line, cell = address // 128, address % 128 // 16
    return line * 128 + cells[line % len(cells), cell] * 16 + address % 16


def test_the_reader_of_the_table_gives_the_isas_examples():
    """9.7.15.5.1.2.1.3, "Exact layout" of the examples in figures 166 to 169."""
    mn, k = np.arange(16)[:, None], np.arange(16)
    exact = {  # (major, swizzle, T, LBO, SBO): the exact layout, evaluated by hand
        ("K", 0, 4, 64, 32): mn % 8 * 4 + mn // 8 * 32 + k % 4 + k // 4 * 64,
        ("K", 32, 4, 0, 64): mn % 8 * 8 + mn // 8 * 64 + k % 4 + k // 4 * 4,
        ("MN", 0, 8, 128, 64): mn % 8 + mn // 8 * 64 + k % 8 * 8 + k // 8 * 128,
        ("MN", 32, 8, 128, 256): mn % 8 + mn // 8 % 2 * 8 + mn // 16 * 128 + k % 8 * 16
        + k // 8 * 256,
    }  # fmt: skip
    for (major, swizzle, t, lbo, sbo), expected in exact.items():
        assert (layout(CANONICAL[major, swizzle], t, lbo, sbo)(mn, k) == expected).all()


@pytest.mark.parametrize("span", PATTERN)
def test_swizzles_are_the_isas_table(span):
    address = np.arange(4096)
    assert (matrix_descriptors.swizzled(address, span) == address_of(0, address, 1, span)).all()
    # What it is for: eight rows of one column of core matrices, all in different banks.
    rows = matrix_descriptors.swizzled(np.arange(8) * span, span)
    banks = (rows[:, None] // 4 + np.arange(4)) % 32
    assert np.unique(banks).size == 32


def test_a_descriptor_has_the_isas_fields():
    bits = 0x1234 | 0x3FFF << 16 | 0x2001 << 32 | 5 << 49 | 2 << 62
    assert matrix_descriptors.decode(bits) == (0x12340, 0x3FFF0, 0x20010, 5, 64)


class Placed:
    """A matrix [extent, K] in a canonical layout, gaps between its parts, and its descriptor."""

    def __init__(self, bits, major, swizzle, start):
        size, (extent, depth) = bits.itemsize, bits.shape
        t, boundary = 16 // size, BOUNDARY[swizzle]
        gap = 3 * 16 if swizzle == 0 else boundary  # strides keep to where a pattern starts
        if major == "MN":
            runs = -(-extent * size // max(swizzle, 16))
            if swizzle:
                lbo = 8 * swizzle + gap
                sbo = lbo * runs + gap
            else:
                sbo, lbo = 128 + gap, (128 + gap) * runs + gap
        else:
            sbo = 8 * max(swizzle, 16) + gap
            lbo = 16 if swizzle else sbo * (extent // 8) + gap
        self.start = -(-start // max(boundary, 16)) * max(boundary, 16)
        place = layout(CANONICAL[major, swizzle], t, lbo // size, sbo // size)
        mn, k = np.arange(extent)[:, None], np.arange(depth)
        first = address_of(self.start, place(mn, k), size, swizzle)
        self.bytes = first[..., None] + np.arange(size)  # [extent, K, size]
        self.raw = bits.reshape(-1).view("u1").reshape(self.bytes.shape)
        self.end = int(self.bytes.max()) + 1
        self.fields = lbo, sbo, swizzle
        assert np.unique(self.bytes).size == self.bytes.size

    def descriptor(self, offset=0):
        """9.7.15.5.1.2.2: matrix-descriptor-encode(x) = (x & 0x3FFFF) >> 4."""
        lbo, sbo, swizzle = self.fields
        encode = [(x & 0x3FFFF) >> 4 for x in (self.start + offset, lbo, sbo)]
        return encode[0] | encode[1] << 16 | encode[2] << 32 | BITS[swizzle] << 62


def evaluate(shape, stride, index, n=8):
    """A CuTe layout of one mode: the leftmost coordinate runs fastest."""
    total = 0
    for extent, step in zip(shape, stride, strict=True):
        extent = n // 8 if extent == "N/8" else extent
        total = total + index % extent * step
        index = index // extent
    return total


def positions(tables, threads, values, n=8):
    """[value, thread] -> m and n (or k) of CUTLASS's m + 64 * n."""
    (thread, value), v = tables, np.arange(values)[:, None]
    return divmod(evaluate(*thread, np.arange(threads)) + evaluate(*value, v, n), 64)[::-1]


def accumulators(found, d, n):
    """Registers [R, lanes] -> matrices [warpgroups, 64, n]."""
    m, column = positions(C_LAYOUT, 128, n // 2, n)
    if SIZE[d] == 2:
        found = np.stack([found & 0xFFFF, found >> 16], 1).reshape(-1, found.shape[1]).astype("u2")
    out = np.zeros((found.shape[1] // 128, 64, n))
    values = decode(np.ascontiguousarray(found), d).reshape(n // 2, -1, 128)
    out[:, m, column] = values.swapaxes(0, 1)
    return out


def set_accumulators(w, first, z, d):
    n = z.shape[2]
    m, column = positions(C_LAYOUT, 128, n // 2, n)
    values = encode(z, d)[:, m, column].swapaxes(0, 1).reshape(n // 2, -1)
    if SIZE[d] == 2:
        values = values[0::2].astype("u4") | values[1::2].astype("u4") << 16
    w.fill(first, values)


def multiply(d, a, b, n, tail="", first=100, a_operand="%rd1", b_operand="%rd2", scale="%p1"):
    k = 32 // SIZE[a]
    count = n // 2 if SIZE[d] == 4 else n // 4
    return (f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b} {registers(first, count)}, "
            f"{a_operand}, {b_operand}, {scale}{tail};")  # fmt: skip


FENCE, COMMIT, WAIT = (f"wgmma.{x};" for x in ("fence.sync.aligned", "commit_group.sync.aligned",
                                               "wait_group.sync.aligned 0"))  # fmt: skip
LAYOUTS = [
    (kind, a, b, n)
    for kind in KINDS
    for a, b, n in [
        *((("K", s), ("K", s), n) for s, n in ((0, 8), (32, 24), (64, 16), (128, 64))),
        *(
            []
            if SIZE[kind[1]] != 2
            else [(("MN", s), ("K", 128), 8) for s in (0, 32, 64, 128)]
            + [(("K", 0), ("MN", s), n) for s, n in ((0, 24), (32, 16), (64, 96), (128, 256))]
            + [(("MN", 128), ("MN", 64), 32)]
        ),
    ]
]


@pytest.mark.parametrize("kind,a_layout,b_layout,n", LAYOUTS, ids=str)
def test_every_layout_of_every_type_multiplies_exactly(kind, a_layout, b_layout, n):
    """Two steps of K from one placed matrix, two warpgroups with an A each, two CTAs."""
    d, a, b = kind
    k, groups = 32 // SIZE[a], 4
    depth = 2 * k if a_layout[0] == b_layout[0] == "K" and a_layout[1] > 32 else k
    x, y = small((groups, 64, depth), a), small((2, n, depth), b)
    z = RNG.integers(-9, 9, (groups, 64, n))
    tail = ", 1, 1" if d != "s32" else ""
    if SIZE[a] == 2:
        tail += f", {int(a_layout[0] == 'MN')}, {int(b_layout[0] == 'MN')}"
    body = [multiply(d, a, b, n, tail)]
    if depth > k:  # the next 32 bytes of K, inside the swizzle's pattern
        body += [multiply(d, a, b, n, tail, a_operand="%rd3", b_operand="%rd4")]
    placed, end = [], 64
    for i in range(2):
        placed.append(Placed(encode(x[i], a), *a_layout, end))
        end = placed[-1].end
    placed.append(Placed(encode(y[0], b), *b_layout, end))
    w = Warps("\n".join([FENCE, *body, COMMIT, WAIT]), threads=256, shared=placed[2].end)
    for cta in range(2):
        for i in range(2):
            w.write_shared(placed[i].bytes, encode_as(x[2 * cta + i], a, placed[i]), cta)
        w.write_shared(placed[2].bytes, encode_as(y[cta], b, placed[2]), cta)
    for register, offset in (("%rd1", 0), ("%rd3", 32)):
        w[register] = np.tile(np.repeat([p.descriptor(offset) for p in placed[:2]], 128), 2)
    w["%rd2"], w["%rd4"] = placed[2].descriptor(), placed[2].descriptor(32)
    w["%p1"] = True
    set_accumulators(w, 100, z, d)
    w.run()
    y = np.repeat(y, 2, axis=0)
    expected = torch.matmul(torch.tensor(x), torch.tensor(y).mT).numpy() + z
    found = accumulators(w.show(100, n // 2 if SIZE[d] == 4 else n // 4), d, n)
    assert np.array_equal(found, expected) and abs(expected).max() > 20
    assert not w.found


def encode_as(matrix, kind, placed):
    return encode(matrix, kind).reshape(-1).view("u1").reshape(placed.bytes.shape)


@pytest.mark.parametrize("d,a,b", KINDS)
def test_a_in_registers(d, a, b):
    n, k = 16, 32 // SIZE[a]
    x, y = small((2, 64, k), a), small((n, k), b)
    tail = ", -1, 1" if d != "s32" else ""
    tail += ", 0" if SIZE[a] == 2 else ""
    w = Warps(FENCE + multiply(d, a, b, n, tail, a_operand=registers(0, 4)) + COMMIT + WAIT)
    placed = Placed(encode(y, b), "K", 32, 0)
    w.write_shared(placed.bytes, placed.raw)
    m, column = positions(A_LAYOUT[SIZE[a]], 128, 16 // SIZE[a])
    elements = encode(x, a)[:, m, column].transpose(1, 0, 2).reshape(16 // SIZE[a], 256)
    shifts = 8 * SIZE[a] * np.arange(4 // SIZE[a], dtype="u4")[:, None]
    w.fill(0, (elements.reshape(4, -1, 256).astype("u4") << shifts).sum(1, dtype="u4"))
    w["%rd2"], w["%p1"] = placed.descriptor(), False  # D = A B, whatever D was
    w.run()
    expected = (x @ y.T) * (1 if d == "s32" else -1)
    assert np.array_equal(accumulators(w.show(100, n // 2 * SIZE[d] // 4), d, n), expected)
    assert not w.found


# --- When it happens ------------------------------------------------------------------------------


def bf16(body, n=8, shared=4096, threads=128, ctas=1):
    """A kernel with A = B = 1 in shared memory, so that each step adds 16, and D = 0."""
    w = Warps(body, threads, ctas, shared)
    ones = Placed(encode(np.ones((64, 16), int), "bf16"), "K", 0, 0)
    w.write_shared(ones.bytes, ones.raw)
    w["%rd1"] = w["%rd2"] = ones.descriptor()
    w["%p1"] = True
    w.fill(100, np.zeros((n // 2, w.unit.n)))
    w.ones = ones
    return w


STEP = multiply("f32", "bf16", "bf16", 8, ", 1, 1, 0, 0")


def test_results_come_at_the_wait_and_not_before():
    w = bf16(FENCE + STEP + STEP + COMMIT + WAIT)
    for _ in range(4):
        w.step()
        assert w.done < 2 or np.isnan(w.show(100, 4).view("f4")).all()
    w.step()
    assert (w.show(100, 4).view("f4") == 32).all() and not w.found


def test_shared_memory_is_read_at_the_wait():
    w = bf16(FENCE + STEP + COMMIT + WAIT)
    for _ in range(3):
        w.step()
    w.write_shared(w.ones.bytes, encode_as(np.full((64, 16), 2), "bf16", w.ones))
    assert (w.run().show(100, 4).view("f4") == 64).all()


def test_a_store_before_the_wait_is_a_race_and_after_it_is_not():
    store = "st.shared.b32 [%r0], %r1;"
    for body, expected in ((STEP + COMMIT + store + WAIT, {"race"}),
                           (STEP + COMMIT + WAIT + store, set())):  # fmt: skip
        w = bf16(FENCE + body)
        w["%r0"], w["%r1"] = np.arange(128) * 4, 0
        assert w.run().found == expected


def test_one_warp_that_has_not_met_the_writer_makes_a_race():
    """Each warp answers for a quarter of what is read."""
    for meet, expected in (([0, 1, 2, 3], set()), ([0, 1, 2], {"race"})):
        w = bf16("st.shared.b32 [%r0], %r1;" + FENCE + STEP + COMMIT + WAIT, threads=256)
        w["%r0"], w["%r1"] = np.arange(256) % 128 * 4 + 1024 * (np.arange(256) > 127), 0
        w.step(np.arange(256) >= 128)  # the other warpgroup writes the last rows
        gids = w.unit.gid.reshape(-1, 32)[[*meet, 4, 5, 6, 7]].reshape(1, -1)
        w.core.races.fence_proxy(w.unit.gid[128:])
        w.core.races.barrier(gids)
        for _ in range(4):
            w.step(np.arange(256) < 128)
        assert w.found - {"missing fence"} == expected


def test_what_threads_have_stored_needs_a_proxy_fence():
    for fence, expected in ((False, {"missing fence"}), (True, set())):
        w = bf16("st.shared.b32 [%r0], %r1;" + FENCE + STEP + COMMIT + WAIT)
        w["%r0"], w["%r1"] = np.arange(128) * 4, 0x3F803F80
        w.step()
        if fence:
            w.core.races.fence_proxy(w.unit.gid)
        w.barrier()
        assert w.run().found == expected
        assert (w.show(100, 4).view("f4") == 16).all()


def test_wait_group_leaves_the_youngest_groups_and_what_is_not_committed():
    wait_one = WAIT.replace("0;", "1;")
    two = FENCE + STEP + COMMIT + STEP + COMMIT + wait_one
    w = bf16(two + STEP + COMMIT + wait_one + STEP + WAIT + COMMIT + WAIT)
    for steps, landed in ((6, 16), (3, 32), (2, 48), (2, 64)):
        for _ in range(steps):
            assert np.isnan(w.show(100, 4).view("f4")).all() or w.done < 2
            w.step()
        (chain,) = wgmma.queue(w.unit).accumulators.values()
        assert (chain.matrix == landed).all()
    assert (w.show(100, 4).view("f4") == 64).all() and not w.found


def test_two_chains_in_turns_and_groups_of_one_cta_alone():
    other = multiply("f32", "bf16", "bf16", 8, ", 1, 1, 0, 0", first=200)
    w = bf16(FENCE + STEP + other + STEP + COMMIT + WAIT, ctas=2)
    w.fill(200, np.full((4, 256), np.float32(5).view("u4")))
    only = np.arange(256) >= 128
    while w.done < len(w.steps):
        w.step(only)
    assert (w.show(100, 4).view("f4") == np.where(only, 32, 0)).all()
    assert (w.show(200, 4).view("f4") == np.where(only, 21, 5)).all()


def test_ctas_may_be_at_different_places():
    """Two CTAs issue one after the other and land together, or the other way round."""
    w = bf16(FENCE + STEP + STEP + COMMIT + WAIT, ctas=2)
    first = np.arange(256) < 128
    for i in range(5):
        w.done = i
        w.step(first)
    for i in range(3):
        w.done = i
        w.step(~first)
    assert np.isnan(w.show(100, 4).view("f4")[:, 128:]).all()
    assert (w.show(100, 4).view("f4")[:, :128] == 32).all()
    w.run()
    assert (w.show(100, 4).view("f4") == 32).all() and not w.found


def test_ctas_may_land_one_after_the_other():
    w = bf16(FENCE + STEP + COMMIT + STEP + COMMIT + WAIT.replace("0;", "1;") + WAIT, ctas=2)
    first = np.arange(256) < 128
    for _ in range(5):
        w.step()
    for step, mask in ((5, first), (6, first), (5, ~first)):
        w.done = step
        w.step(mask)
    values = w.show(100, 4).view("f4")
    assert (values[:, :128] == 32).all() and np.isnan(values[:, 128:]).all()
    w.run(~first)
    assert (w.show(100, 4).view("f4") == 32).all() and not w.found


def test_steps_of_different_ctas_are_not_one_product():
    """CTA 0 does both steps, CTA 1 only the second."""
    w = bf16(FENCE + STEP + STEP + COMMIT + WAIT, ctas=2)
    w.step()
    w.step(np.arange(256) < 128)
    w.run()
    assert (w.show(100, 4).view("f4") == np.repeat([32, 16], 128)).all()


def test_without_scale_d_a_step_begins_anew():
    for first, second, expected in ((True, True, 37), (True, False, 16), (False, True, 32)):
        w = bf16(FENCE + STEP + STEP.replace("%p1", "%p2") + COMMIT + WAIT)
        w.fill(100, np.full((4, 128), np.float32(5).view("u4")))
        w["%p1"], w["%p2"] = first, second
        assert (w.run().show(100, 4).view("f4") == expected).all() and not w.found


def test_nobody_has_written_what_wgmma_reads():
    w = bf16(FENCE + STEP + COMMIT + WAIT)
    w.core.shared.initialised[100] = False
    w.core.shared.initialised[111] = False
    assert w.run().found == {"uninitialised"}


def test_registers_that_are_touched_in_flight_are_reported():
    in_registers = multiply("f32", "bf16", "bf16", 8, ", 1, 1, 0", a_operand=registers(0, 4))
    for step, touched in ((STEP, "%r102"), (in_registers, "%r2")):
        w = bf16(FENCE + step + COMMIT + WAIT)
        w.fill(0, np.full((4, 128), 0x3F803F80))
        for _ in range(3):
            w.step()
        w[touched] = 1
        assert w.run().found == {"wgmma registers"}


def test_other_accumulators_that_overlap_are_reported():
    shifted = multiply("f32", "bf16", "bf16", 8, ", 1, 1, 0, 0", first=102)
    w = bf16(FENCE + STEP + shifted + COMMIT + WAIT)
    w.fill(104, np.zeros((2, 128)))
    for _ in range(3):
        w.step()
    assert w.found == {"wgmma registers"}


def test_the_end_of_the_kernel_finds_what_nobody_waited_for():
    w = bf16(FENCE + STEP + COMMIT)
    w.run()
    wgmma.ending(w.core, w.unit)
    assert w.found == {"unfinished"}


def test_saturation_and_wrapping_of_integers():
    for satfinite, expected in (("", -(2**31) + 31), (".satfinite", 2**31 - 1)):
        step = multiply("s32", "s8", "s8", 8).replace("k32", "k32" + satfinite)
        w = Warps(FENCE + step + COMMIT + WAIT, ctas=1)
        w.write_shared(np.arange(4096), 1)
        w["%rd1"] = w["%rd2"] = 8 << 16 | 16 << 32
        w["%p1"] = True
        w.fill(100, np.full((4, 128), 2**31 - 1))
        assert (w.run().show(100, 4).view("i4") == expected).all()


# --- What is refused, what is a fault -------------------------------------------------------------


@pytest.mark.parametrize("change,message", [
    (lambda w: w.__setitem__("%rd2", w["%rd2"] + (np.arange(128) == 40)), "differ in a matrix"),
    (lambda w: w.__setitem__("%rd1", w["%rd1"] | np.uint64(1 << 49)), "base offset"),
    (lambda w: w.__setitem__("%rd1", w["%rd1"] + np.uint64(200)), "out of bounds"),
    (lambda w: w.__setitem__("%p1", np.arange(128) < 64), "differ in scale-d"),
])  # fmt: skip
def test_faults(change, message):
    w = bf16(FENCE + STEP + COMMIT + WAIT, shared=2700)
    change(w)
    with pytest.raises(MachineFault, match=message):
        w.run()


@pytest.mark.parametrize("steps", range(4))
def test_all_four_warps_must_be_there(steps):
    w = bf16(FENCE + STEP + COMMIT + WAIT)
    for _ in range(steps):
        w.step()
    with pytest.raises(MachineFault, match="all 128 lanes of a warpgroup, 96 are here"):
        w.step(np.arange(128) < 96)


def test_a_warpgroup_begins_at_a_multiple_of_four_warps():
    w = bf16(FENCE, threads=192)
    with pytest.raises(MachineFault, match="multiple of four"):
        w.run()


@pytest.mark.parametrize("op", [
    STEP.replace("n8", "n12"),
    STEP.replace("k16", "k32"),
    STEP.replace("mma_async", "mma_async.sp"),
    STEP.replace("%r103}", "%r103, %r104}"),
    multiply("f32", "tf32", "tf32", 8, ", 1, 1, 1, 0"),
    multiply("s32", "s8", "s8", 8).replace("k32.s32.s8.s8", "k256.s32.b1.b1.and.popc"),
])  # fmt: skip
def test_forms_that_are_not_executed(op):
    with pytest.raises(UnknownInstruction):
        Warps(op)


# --- wgmma.fence ----------------------------------------------------------------------------------

OTHER = STEP.replace("n8", "n16").replace("}", ", %r104, %r105, %r106, %r107}")
FROM_A = multiply("f32", "bf16", "bf16", 8, ", 1, 1, 0", a_operand=registers(0, 4))
TOUCH, TOUCH_A, READ = "mov.b32 %r101, 0;", "mov.b32 %r3, 0;", "mov.b32 %r50, %r101;"


@pytest.mark.parametrize("body,missing", [
    (FENCE + STEP + STEP + COMMIT + WAIT, 0),
    (STEP + STEP, 2),  # none before the first
    (FENCE + STEP + WAIT + STEP, 0),  # only wgmmas of one shape
    (FENCE + STEP + WAIT + TOUCH + STEP, 1),
    (FENCE + STEP + WAIT + READ + STEP, 1),  # a read is an access as well
    (FENCE + STEP + WAIT + TOUCH + FENCE + STEP, 0),
    (FENCE + STEP + OTHER, 1),  # of another shape
    (FENCE + TOUCH_A + STEP, 0),  # a register that this wgmma does not use
    (FENCE + TOUCH_A + FROM_A, 1),
    (FENCE + FROM_A + FROM_A, 0),
    (FENCE + FROM_A + FROM_A.replace("%r100", "%r3"), 1),  # A becomes an accumulator
    (FENCE + f"$again: {STEP} {TOUCH} @%p2 bra $again;", 1),  # from the last turn of the loop
    (f"$again: {FENCE} {STEP} {TOUCH} @%p2 bra $again;", 0),
    (f"@%p2 bra $skip; {FENCE} $skip: {STEP}", 1),  # one of two paths
    (f"@%p2 bra $skip; {FENCE} bra $there; $skip: {FENCE} $there: {STEP}", 0),
    (f"{FENCE} {TOUCH} bra $end; {STEP} $end: ", 0),  # never reached
    (f"{FENCE} {TOUCH} @%p2 bra $end; {STEP} $end: ", 1),  # reached if not %p2
])  # fmt: skip
def test_missing_wgmma_fences_are_found_on_all_paths(body, missing):
    found = wgmma_fences.unfenced(ptx.parse(HEAD.format(threads=128, body=body)))
    assert len(found) == missing, found

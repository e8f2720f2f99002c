"""wgmma: the tensor cores as a warpgroup of Hopper (sm_90) uses them.

Read tensor_cores.py and matrix_descriptors.py first. Four warps together, a warpgroup, multiply
A (64 x K, K is 32 bytes) by B (K x n, n up to 256), while they go on with other things:

    wgmma.fence                           the registers are ready (wgmma_fences.py)
    wgmma.mma_async  D, a, b, scale-d     D = A B + D begins; without scale-d it is D = A B
    wgmma.mma_async  D, a', b', scale-d   the next step of K, in order
    wgmma.commit_group                    what has begun since the last commit is one group
    ...                                   loads for the next tile, address arithmetic
    wgmma.wait_group 1                    all groups but the youngest one have landed

B is in shared memory, A there or in registers. D is in the registers of all 128 threads. Warp w has
rows 16w to 16w + 15, each 8 columns of them as mma.sync has them; A in registers is cut likewise:

              columns 0-7   8-15   ...
    rows  0-15    warp 0: registers 0-3, then 4-7, ...
    rows 16-31    warp 1
    rows 32-47    warp 2
    rows 48-63    warp 3

Asynchronous means that a program must not count on when it happens. The machine takes the latest
moment: at the wait_group that covers it, a wgmma reads shared memory and the registers of A, and
its result comes. Until then its accumulators show a NaN pattern to everybody but the next wgmma in
line. So a missing wait, or a buffer that is filled again too early, gives wrong numbers. The checks
say why:

  * races: the read of shared memory lasts from the wgmma to the wait. It goes through the async
    proxy: what st.shared wrote needs a fence.proxy.async before it (races.py).
  * registers: a write to an accumulator, or to A, of a wgmma in flight is reported when it lands.

The tensor cores of Hopper add products of 8-bit floats with about 14 bits (DeepSeek-V3 Technical
Report, section 3.3.2). The machine adds them in float32, so it does not show this error.

Sources: PTX ISA 9.0, sections 9.7.15.4 (async proxy), 9.7.15.5.1.1 (fragments), 9.7.15.5.2
(mma_async), 9.7.15.7 (fence, commit, wait).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tilelab.perf.machine.collectives import whole_warps
from tilelab.perf.machine.errors import UnknownInstruction
from tilelab.perf.machine.memory import written
from tilelab.perf.machine.ptx import Vector
from tilelab.perf.machine.tensor.matrix_descriptors import pieces
from tilelab.perf.machine.tensor.tensor_cores import (
    ACCUMULATORS,
    FORMATS,
    SHAPE,
    WORD,
    a_matrix,
    accumulator_matrix,
    accumulator_registers,
    add_product,
    stack,
    words,
)

LONGEST = 8  # wgmmas in one product: sums of 256 integer products are exact in float32
POISON = np.uint32(0x7FEDFFED)  # NaN as f32 and as two f16; as s32 a number that stands out
PIECE = np.dtype("c16")  # 16 bytes that NumPy copies at once; never looked at as a number


# --- What is in flight ----------------------------------------------------------------------------


class Form(NamedTuple):
    """What one wgmma.mma_async says, as it is parsed once."""

    inst: Any
    n: int
    dtype: np.dtype  # of D
    size: int  # of an element of A and B, in bytes
    numbers: tuple[Callable, Callable]  # of A and B: bits -> float32
    mn_major: tuple[bool, bool]
    sign: int
    saturate: bool
    accumulators: tuple[str, ...]  # type and registers of D: who they are
    d_names: frozenset[str]
    d_reads: list[Callable]
    d_writes: list[Callable]
    a_reads: list[Callable] | None  # of its registers; None: A is in shared memory


@dataclass
class Issue:
    """One wgmma.mma_async in flight, of those warpgroups of the unit that have not landed it.

    Attributes:
        groups: [G] the warpgroups.
        commit: [G] the number of the commit group to which it belongs in each.
        a, b: [G, ...] offsets of its pieces; a may be registers [G, 4, 128] instead.
        accumulate: [G] D = A B + D, else D = A B.
        time: when it began.
    """

    form: Form
    groups: np.ndarray
    commit: np.ndarray
    a: np.ndarray
    b: np.ndarray
    accumulate: np.ndarray
    time: int

    def split(self, chosen: np.ndarray) -> "Issue":
        """The part of it that is of these warpgroups, a mask [G]."""
        if chosen.all():
            return self
        part = (x[chosen] for x in (self.groups, self.commit, self.a, self.b, self.accumulate))
        return Issue(self.form, *part, self.time)


@dataclass
class Accumulators:
    """The true values of accumulators whose registers show poison. [G]: all of the unit's groups.

    A chain of wgmmas, and a whole loop that always has one in flight, goes on in `matrix`; the
    registers are read before the first and written after the last.
    """

    matrix: np.ndarray  # [G, 64, n]
    in_flight: np.ndarray  # [G]


class Queue:
    """The wgmmas of one unit."""

    def __init__(self, unit: Any) -> None:
        self.first = np.arange(0, unit.n, 128)  # a lane of each warpgroup
        self.index = unit.thread[self.first] // 128  # of each warpgroup, in its CTA
        self.commits = np.zeros(self.first.size, np.int64)  # committed so far
        self.issues: list[Issue] = []
        self.accumulators: dict[tuple, Accumulators] = {}  # by Form.accumulators

    def mask(self, groups: np.ndarray) -> np.ndarray | None:
        """The lanes of warpgroups; None is all."""
        if groups.size == self.first.size:
            return None
        mask = np.zeros((self.first.size, 128), bool)
        mask[groups] = True
        return mask.ravel()

    def take(self, groups: np.ndarray, keep: int) -> list[Issue]:
        """Remove and return what is to land: all but the `keep` youngest commit groups."""
        here = np.zeros(self.first.size, bool)
        here[groups] = True
        due, left = [], []
        for issue in self.issues:
            lands = here[issue.groups] & (issue.commit < self.commits[issue.groups] - keep)
            if lands.any():
                due.append(issue.split(lands))
            if not lands.all():
                left.append(issue.split(~lands))
        self.issues = left
        return due


def queue(unit: Any) -> Queue:
    """The queue of a unit; made when it is first asked for."""
    if "wgmma" not in unit.state:
        unit.state["wgmma"] = Queue(unit)
    return unit.state["wgmma"]


# --- Landing --------------------------------------------------------------------------------------


def land(core: Any, unit: Any, due: list[Issue]) -> None:
    """Do the products, in the order in which they began; all that is read is read now."""
    flying = queue(unit)
    while due:
        first = due[0]
        form, groups = first.form, first.groups
        # Steps along K that only add to one accumulator are one product with a longer K.
        count = 1
        if form.dtype == np.float32 or form.dtype == np.int32 and not form.saturate:
            while count < min(len(due), LONGEST) and _continues(first, due[count]):
                count += 1
        together, due = due[:count], due[count:]
        operands = [_operands(core, unit, issue) for issue in together]
        a, b = operands[0]
        if count > 1:
            a = np.concatenate([a for a, _ in operands], axis=2)
            b = np.concatenate([b for _, b in operands], axis=1)
        product = np.matmul(a, b)
        if form.sign < 0:
            product = -product
        chain = flying.accumulators[form.accumulators]
        chain.matrix[groups[~first.accumulate]] = 0
        if form.dtype == np.float32 and groups.size == len(chain.matrix):  # the usual case
            chain.matrix += product
        else:
            chain.matrix[groups] = add_product(chain.matrix[groups], product, form.saturate)
        chain.in_flight[groups] -= count
        over = groups[chain.in_flight[groups] == 0]
        if over.size:
            _write_back(core, unit, form, chain, over)


def _continues(first: Issue, other: Issue) -> bool:
    a, b = first.form, other.form
    return (
        (a.accumulators, a.sign, a.saturate) == (b.accumulators, b.sign, b.saturate)
        and bool(other.accumulate.all())
        and np.array_equal(first.groups, other.groups)
    )


def _operands(core: Any, unit: Any, issue: Issue) -> tuple[np.ndarray, np.ndarray]:
    """A [G, 64, K] and B [G, K, n] in float32."""
    form = issue.form
    b = _load(core, form, issue.b, 1)
    if not form.mn_major[1]:
        b = b.swapaxes(1, 2)
    if form.a_reads is None:
        a = _load(core, form, issue.a, 0)
        return (a.swapaxes(1, 2) if form.mn_major[0] else a), b
    registers = _grouped(stack(form.a_reads, unit), issue.groups)
    if (registers != issue.a).any():
        core.report("wgmma registers", form.inst, "a register of A was written while a wgmma that "
                    "reads it was in flight")  # fmt: skip
    flat = np.ascontiguousarray(registers.swapaxes(0, 1)).reshape(len(form.a_reads), -1)
    a = a_matrix(form.numbers[0](words(flat, form.size)))
    return a.reshape(-1, 64, a.shape[2]), b


def _grouped(registers: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Registers [R, N] of some warpgroups: a copy [G, R, 128]."""
    return registers.reshape(len(registers), -1, 128)[:, groups].swapaxes(0, 1)


def _load(core: Any, form: Form, offsets: np.ndarray, which: int) -> np.ndarray:
    """Pieces of A (0) or B (1) [G, rows, pieces] as numbers [G, rows, elements of a row]."""
    written(core, form.inst, offsets.ravel(), 16)
    raw = core.shared.bytes.view(PIECE)[offsets >> 4]
    bits = raw.view(WORD[form.size]).reshape(*offsets.shape[:2], -1)
    return form.numbers[which](bits)


def _write_back(core: Any, unit: Any, form: Form, chain: Accumulators, groups: np.ndarray) -> None:
    """The last wgmma in flight on these accumulators is over: their registers show the result."""
    mask = queue(unit).mask(groups)
    shown = stack(form.d_reads, unit)
    if ((shown if mask is None else shown[:, mask]) != POISON).any():
        core.report("wgmma registers", form.inst, "an accumulator was written while a wgmma was "
                    "in flight on it")  # fmt: skip
    values = accumulator_registers(chain.matrix.reshape(-1, 16, form.n))
    for write, value in zip(form.d_writes, values, strict=True):
        write(unit, value, mask)


# --- Handlers -------------------------------------------------------------------------------------


def parse_form(inst: Any, core: Any) -> Form:
    """Take a wgmma.mma_async apart."""
    d, a, _, _, *immediates = inst.operands
    d_type, a_type, b_type = inst.parts[-3:]
    shape = next((x for part in inst.parts if (x := SHAPE.match(part))), None)
    known = shape and d_type in ACCUMULATORS and a_type in FORMATS and b_type in FORMATS
    size = FORMATS[a_type][0] if known else 0
    m, n, k = map(int, shape.groups()) if shape else (0, 0, 0)
    if (
        not known or m != 64 or n % 8 or not 8 <= n <= 256 or k * size != 32
        or FORMATS[b_type][0] != size or "sp" in inst.parts
        or (d_type == "s32") != (a_type in ("s8", "u8"))
    ):  # fmt: skip
        raise UnknownInstruction(f"{inst.where}: this shape or type of wgmma is not executed")
    values = [x.value for x in immediates]
    scales, transposes = values[:2], values[2:]
    if any(transposes) and size != 2:
        raise UnknownInstruction(f"{inst.where}: only 16-bit operands can be transposed")
    if len(d.items) != n * ACCUMULATORS[d_type].itemsize // 8:
        raise UnknownInstruction(f"{inst.where}: the number of accumulators does not fit the shape")
    names = [x.name for x in d.items]
    in_registers = isinstance(a, Vector)
    if in_registers and transposes:  # A in registers has no layout to choose
        transposes = [0, *transposes]
    return Form(
        inst, n, ACCUMULATORS[d_type], size, (FORMATS[a_type][1], FORMATS[b_type][1]),
        tuple(map(bool, transposes)) or (False, False), int(np.prod(scales or [1])),
        "satfinite" in inst.parts, (d_type, *names), frozenset(names),
        [core.read(x, np.dtype("u4")) for x in d.items],
        [core.write(x, np.dtype("u4")) for x in d.items],
        [core.read(x, np.dtype("u4")) for x in a.items] if in_registers else None,
    )  # fmt: skip


def build_mma_async(inst: Any, core: Any) -> Callable:
    """wgmma.mma_async: a product begins; it lands at a wgmma.wait_group."""
    form, index = parse_form(inst, core), core.index(inst)
    a_bits = None if form.a_reads else core.read(inst.operands[1], np.dtype("u8"))
    b_bits = core.read(inst.operands[2], np.dtype("u8"))
    scale = core.read(inst.operands[3], np.dtype(bool))

    def uniform(unit: Any, groups: np.ndarray, values: Any, what: str) -> np.ndarray:
        """One value of each warpgroup, in which all threads must agree."""
        values = np.broadcast_to(values, unit.n).reshape(-1, 128)[groups]
        if (values != values[:, :1]).any():
            core.fail(inst, unit, groups[0] * 128, f"the threads of a warpgroup differ in {what}")
        return values[:, 0]

    def addresses(
        unit: Any, groups: np.ndarray, bits: Any, extent: int, mn_major: bool, time: int
    ) -> np.ndarray:
        """Offsets of the pieces of an operand [G, rows, pieces], checked; the races are told."""
        bits = uniform(unit, groups, bits, "a matrix descriptor")
        if (bits >> np.uint64(49) & np.uint64(7)).any():
            core.fail(inst, unit, groups[0] * 128, "a descriptor with a base offset: not executed")
        at = np.stack([pieces(int(x), extent, mn_major) for x in bits])  # [G, rows, pieces]
        each = at[0].size
        lanes = np.repeat(groups * 128, each)
        offsets = core.shared.offsets(core, inst, unit, lanes, at.ravel(), 16)
        # The four warps share the reading: of each quarter, ask what one of them knows.
        quarter = np.repeat(np.arange(4) * 32, each // 4)
        knowers = unit.gid[(groups[:, None] * 128 + quarter).ravel()]
        agents = np.array([core.races.agent("wgmma", int(i)) for i in queue(unit).index[groups]])
        core.races.read_as(
            "shared", index, np.repeat(agents, each), time, knowers, offsets, 16, proxy="async"
        )
        return offsets.reshape(at.shape)

    def issue(unit: Any, mask: np.ndarray | None) -> None:
        groups, flying = whole_warps(core, inst, unit, mask, 128), queue(unit)
        chain = flying.accumulators.get(form.accumulators)
        others = [
            x for x in flying.issues
            if x.form.accumulators != form.accumulators and np.isin(x.groups, groups).any()
            and not x.form.d_names.isdisjoint(form.d_names)
        ]  # fmt: skip
        if others:
            core.report("wgmma registers", inst, "accumulators that another wgmma, with another "
                        "list of registers, still has in flight", others[0].form.inst)  # fmt: skip
        if chain is None:
            shape = (flying.first.size, 64, form.n)
            chain = Accumulators(np.zeros(shape, form.dtype), np.zeros(flying.first.size, int))
            flying.accumulators[form.accumulators] = chain
        accumulate = uniform(unit, groups, scale(unit), "scale-d")
        idle = chain.in_flight[groups] == 0
        if idle.any():
            idle, needed = groups[idle], bool(accumulate[idle].any())
            if needed:
                matrix = accumulator_matrix(stack(form.d_reads, unit), form.dtype)
                chain.matrix[idle] = matrix.reshape(chain.matrix.shape)[idle]
            lanes = flying.mask(idle)
            for write in form.d_writes:
                write(unit, POISON, lanes)
        chain.in_flight[groups] += 1
        time = core.races.tick()
        b = addresses(unit, groups, b_bits(unit), form.n, form.mn_major[1], time)
        if form.a_reads is None:
            a = addresses(unit, groups, a_bits(unit), 64, form.mn_major[0], time)
        else:
            a = _grouped(stack(form.a_reads, unit), groups)
        commit = flying.commits[groups]
        flying.issues.append(Issue(form, groups, commit, a, b, accumulate, time))

    return issue


def build_fence(inst: Any, core: Any) -> Callable:
    """wgmma.fence: orders registers; `unfenced` has looked where it is missing."""

    def fence(unit: Any, mask: np.ndarray | None) -> None:
        whole_warps(core, inst, unit, mask, 128)

    return fence


def build_commit_group(inst: Any, core: Any) -> Callable:
    """wgmma.commit_group: what has begun and belongs to no group yet is one."""

    def commit(unit: Any, mask: np.ndarray | None) -> None:
        queue(unit).commits[whole_warps(core, inst, unit, mask, 128)] += 1

    return commit


def build_wait_group(inst: Any, core: Any) -> Callable:
    """wgmma.wait_group N: all but the N youngest groups land."""
    keep = inst.operands[0].value

    def wait(unit: Any, mask: np.ndarray | None) -> None:
        groups, flying = whole_warps(core, inst, unit, mask, 128), queue(unit)
        due = flying.take(groups, keep)
        land(core, unit, due)
        for issue in due:
            for which in np.unique(flying.index[issue.groups]):
                mine = issue.groups[flying.index[issue.groups] == which]
                gids = unit.gid[(mine[:, None] * 128 + np.arange(128)).ravel()]
                core.races.learn(gids, core.races.agent("wgmma", int(which)), issue.time)

    return wait


def ending(core: Any, unit: Any) -> None:
    """The kernel has ended: what nobody waited for is a mistake."""
    for issue in queue(unit).issues:
        core.report("unfinished", issue.form.inst, "a CTA ends without waiting for this wgmma")


HANDLERS = {
    "wgmma.mma_async": build_mma_async,
    "wgmma.fence": build_fence,
    "wgmma.commit_group": build_commit_group,
    "wgmma.wait_group": build_wait_group,
}

"""Where a wgmma.fence is missing, found by reading the kernel and not by running it.

wgmma works on registers while the threads go on. The hardware does not look whether an instruction
before it is done with the same registers: wgmma.fence makes sure of it. It must stand

  * before the first wgmma, and
  * between whatever touches an accumulator, or a register that holds A, and a wgmma that uses it.

Only wgmmas of one shape may follow one another on the same accumulators without (PTX ISA 9.0,
section 9.7.15.7.1).

        mov.b32 %r1, 0          touches %r1
        wgmma.fence                                      forgets
        wgmma.mma_async {%r1}                            fine
        wgmma.mma_async {%r1}                            fine: the same shape
        wgmma.wait_group 0
        add.f32 %r1, %r1, %r2   touches %r1
        wgmma.mma_async {%r1}                            reported
"""

from tilelab.perf.machine.ptx import Instruction, Program, Vector, names_of

MULTIPLY, FENCE = "wgmma.mma_async", "wgmma.fence"


def _shape(inst: Instruction) -> str:
    return next(part for part in inst.parts if part.startswith("m64"))


def _accumulators(inst: Instruction) -> set[str]:
    return set(names_of(inst.operands[0]))


def _multiplicand(inst: Instruction) -> set[str]:
    """The registers of A; none if it is in shared memory, behind a descriptor."""
    return set(names_of(inst.operands[1])) if isinstance(inst.operands[1], Vector) else set()


def unfenced(program: Program) -> list[tuple[Instruction, str]]:
    """Each wgmma.mma_async that a path reaches without the fence it needs, and why it needs it.

    What was touched since the last wgmma.fence is followed along all paths of the program, with the
    union where paths meet (a forward data flow). So it costs nothing while the kernel runs.
    """
    multiplies = [i for block in program.blocks for i in block if i.op.startswith(MULTIPLY)]
    used = set().union(*(_accumulators(i) | _multiplicand(i) for i in multiplies))
    # Of each block, what was touched before it: (register, by "thread", "A" or a wgmma's shape).
    before: dict[int, set[tuple[str, str]]] = {0: {("", "start")}}
    found: dict[tuple[int, int], tuple[Instruction, str]] = {}  # by block and position
    todo = [0] if multiplies else []
    while todo:
        number = todo.pop()
        touched = set(before[number])
        for position, inst in enumerate(program.blocks[number]):
            if inst.op.startswith(FENCE):
                touched.clear()
            elif inst.op.startswith(MULTIPLY):
                if why := _missing_fence(inst, touched):
                    found[number, position] = inst, why
                touched |= {(name, _shape(inst)) for name in _accumulators(inst)}
                touched |= {(name, "A") for name in _multiplicand(inst)}
            else:
                names = {name for operand in inst.operands for name in names_of(operand)}
                touched |= {(name, "thread") for name in names & used}
        for after in program.successors(number):
            if after not in before or not touched <= before[after]:
                before[after] = before.get(after, set()) | touched
                todo.append(after)
    return [found[where] for where in sorted(found)]


def _missing_fence(inst: Instruction, touched: set[tuple[str, str]]) -> str:
    if ("", "start") in touched:
        return "no wgmma.fence before the first wgmma"
    accumulators, multiplicand = _accumulators(inst), _multiplicand(inst)
    for name, how in sorted(touched):
        if name in accumulators and how != _shape(inst) or name in multiplicand and how != "A":
            whom = {"thread": "a thread", "A": "a wgmma, as A,"}.get(how, f"a wgmma {how}")
            return f"{name} was touched by {whom} with no wgmma.fence since"
    return ""

"""What the compiler made of a kernel, read from its machine code; no GPU is needed.

Most reasons why one tile loses against another show here, before anything is timed: registers that
spill to memory, a loop that misses the tensor cores, loads of two bytes where sixteen fit. NVIDIA's
code (SASS) comes from nvdisasm and cuobjdump, which ship inside triton. AMD's assembly is what
triton's compiler emits. Both become lists of `Instruction`, and the rest is the same for both.

A kernel spends most of its time in its main loop, so that is found first. A loop is what compilers
call a natural loop: a jump back to an instruction that every path to the jump has passed. A jump
back alone proves nothing. Code that is rarely needed, such as waiting for a slow copy, is moved
behind the kernel's end and jumps back from there.
"""

import importlib.util
import math
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

from tilelab.perf.errors import PerfError


class Instruction(NamedTuple):
    """One machine instruction.

    Attributes:
        name: with its modifiers, "LDG.E.128" or "buffer_load_dwordx4".
        operands: the text behind the name.
        predicate: the condition in front of it, such as "@!P0"; mostly "".
        source: (file, line) of the source, if known; else ("", 0).
    """

    name: str
    operands: str = ""
    predicate: str = ""
    source: tuple[str, int] = ("", 0)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.predicate, self.name, self.operands]))


class Code(NamedTuple):
    """The instructions of a kernel, and where in the list its labels are."""

    instructions: list[Instruction]
    labels: dict[str, int]


# -------------------------------------------------------------------------------------------------
# What belongs to which group: the first pattern that matches the whole name, without the modifiers
# that NVIDIA appends after a dot. Global stores, spills and constants are among the "other".
# -------------------------------------------------------------------------------------------------

NVIDIA_GROUPS = {
    "tensor core": r"(UTC)?[BDHIOQ]G?MMA",
    "load": r"LDG?|LDGSTS|UTMALDG|UBLKCP",
    "shared memory": r"LDSM?|STSM?|ATOMS|LDTM|STTM|UTCCP",  # TM: Blackwell's tensor memory
    "float": r"U?F(ADD|MUL|FMA|SEL|SET|SETP|MNMX|CHK|RND|SWZADD)\d?|MUFU|F2FP?"
    r"|F?[HD](ADD|MUL|FMA|MNMX|SETP?)2?",
    "control": r"BRAU?|BRXU?|JMPX?|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|NOP|YIELD|NANOSLEEP|ELECT"
    r"|BAR|WARP\w+|SYNCS|U?CGABAR\w*|UTCBAR|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ERRBAR|CCTL\w*|USETMAXREG"
    r"|UTMACMDFLUSH|UTMACCTL|ACQBULK|PREEXIT|KILL|BPT",
    "integer": r"U?(I\w+|LEA|LOP3?|PLOP3|SH[FLR]|MOV|SEL|PRMT|P2R|P2UR|POPC|FLO|BREV|SGXT|BMSK"
    r"|VIADD\w*|VIMNMX\w*|VHMNMX|F2I\w*|I2F\w*)|R2P|R2UR|UP2UR|S2U?R|CS2U?R",
}
AMD_GROUPS = {
    "tensor core": r"v_s?mfmac?_\w+",
    "load": r"(buffer|global|flat)_load_\w+",
    "shared memory": r"ds_\w+",
    "control": r"s_(c?branch|waitcnt|barrier|nop|sleep|endpgm|setpc|swappc|setprio|sched)\w*",
    "float": r"v_(?!mov|cndmask)\w*(f16|f32|f64|bf16)\w*",
    "other": r"s_(load|buffer|store|dcache|memtime)\w*",
    "integer": r"[sv]_\w+",
}
WORKING = ("tensor core", "load", "shared memory", "float")
ENDS = r"EXIT|RET|KILL|BRXU?|JMPX|s_endpgm|s_setpc_b64"
JUMPS = r"BRAU?|JMP|s_c?branch\w*"
STORES = r"STG?|UTMASTG|(buffer|global|flat)_store_\w+"


def _base(instruction: Instruction) -> str:
    return instruction.name.split(".")[0]


def _is(instruction: Instruction, pattern: str) -> bool:
    return re.fullmatch(pattern, _base(instruction)) is not None


def _group(instruction: Instruction) -> str:
    if instruction.predicate == "@!PT":
        return "other"  # never runs: ptxas fills with loads of nothing, `@!PT LDS RZ, [RZ]`
    groups = AMD_GROUPS if instruction.name[0].islower() else NVIDIA_GROUPS
    return next((name for name, pattern in groups.items() if _is(instruction, pattern)), "other")


# -------------------------------------------------------------------------------------------------
# The two public analyses.
# -------------------------------------------------------------------------------------------------


def analyse_cubin(cubin: bytes) -> dict:
    """What to know of a kernel compiled for an NVIDIA GPU.

    Args:
        cubin: the binary: `asm["cubin"]` of Triton's compiled kernel.

    Returns:
        registers: of a thread.
        spills: bytes of memory a thread that hold what did not fit the registers.
        tensor_core: the widest tensor-core instruction of the main loop (of the kernel, if it has
            no loop), such as "HGMMA.64x256x16.F32.BF16"; None without.
        tensor_cores_in_loop: how many of them one turn of the main loop has.
        operands: where Hopper's (wgmma) and Blackwell's read A: "shared", "registers" or "tensor
            memory"; None for the older ones, which read registers only, and without.
        serialised: each wgmma waits for the one before, see `_serialised`.
        load_bytes: width of the narrowest load from global memory, a thread, in the main loop (in
            the kernel, if that has none); 16 for TMA, also by another warp; None without.
        store_bytes: of the narrowest store to global memory, in the kernel.
        tma: whether the kernel uses the TMA unit to load or store.
        loop_instructions: of the main loop: the innermost with tensor-core instructions, or else
            the longest innermost one. None without a loop.
        instructions: of the kernel as listed, padding included.
        loop_mix: instructions of the main loop by group, see NVIDIA_GROUPS; {} without a loop.

    Raises:
        PerfError: no binary, a tool that is missing, or a binary that it does not understand.
    """
    usage = _tool("cuobjdump", ["-res-usage"], cubin)
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        raise PerfError("cuobjdump names no kernel in this cubin")
    registers, stack, local = (max(map(int, column)) for column in zip(*found, strict=True))
    code = parse_sass(_tool("nvdisasm", ["-c", "-ndf"], cubin))
    return {"registers": registers, "spills": stack + local} | _analyse(code)


def analyse_amdgcn(text: str) -> dict:
    """What to know of a kernel compiled for an AMD GPU, with the keys of `analyse_cubin`.

    Args:
        text: the assembly: `asm["amdgcn"]` of Triton's compiled kernel.

    Returns:
        As `analyse_cubin`. `registers` are the vector registers of a lane, ordinary and
        accumulation ones together; `spills` counts those that are stored to memory, 4 bytes each.
        There is no wgmma and no TMA, so `operands` is None, `serialised` and `tma` are False.

    Raises:
        PerfError: the text holds no kernel.
    """
    registers = re.search(r"^\s+\.vgpr_count:\s+(\d+)", text, re.M)
    spilled = re.search(r"^\s+\.vgpr_spill_count:\s+(\d+)", text, re.M)
    if not registers or not spilled:
        raise PerfError("no kernel in this AMD assembly: its metadata has no .vgpr_count")
    code = parse_amdgcn(text)
    return {"registers": int(registers[1]), "spills": 4 * int(spilled[1])} | _analyse(code)


def annotate(cubin: bytes) -> list[tuple[str, int, str]]:
    """The main loop in the order of the machine code: (source file, source line, instruction).

    Where a function of triton's own is inlined, the line is the kernel's that called it, if the
    compiler recorded it (3.9.0 does, 3.6.0 does not). Without a loop it is the whole kernel. The
    file is "" where the compiler left no line.

    Raises:
        PerfError: as `analyse_cubin`.
    """
    code = parse_sass(_tool("nvdisasm", ["-c", "-ndf", "-gi"], cubin))
    loop = main_loop(code) or range(len(code.instructions))
    return [(*x.source, str(x)) for x in (code.instructions[i] for i in loop)]


def _analyse(code: Code) -> dict:
    loop = main_loop(code)
    body = [code.instructions[i] for i in loop] if loop else code.instructions
    tensor = [x for x in body if _group(x) == "tensor core"]
    loads = [x for x in body if _group(x) == "load"]
    if not loads and tensor:  # warp-specialised: another warp's loop loads
        loads = [x for x in code.instructions if _is(x, "UTMALDG")]
    return {
        "tensor_core": max(tensor, key=_flops).name if tensor else None,
        "tensor_cores_in_loop": len(tensor) if loop else 0,
        "operands": _operands(tensor),
        "serialised": _serialised(body),
        "load_bytes": _narrowest(loads or code.instructions, "load"),
        "store_bytes": _narrowest(code.instructions, "store"),
        "tma": any(_is(x, r"UTMA(LDG|STG|REDG)") for x in code.instructions),
        "loop_instructions": len(loop) if loop else None,
        "instructions": len(code.instructions),
        "loop_mix": dict(Counter(map(_group, body))) if loop else {},
    }


def _flops(instruction: Instruction) -> int:
    """A measure of an instruction's work, from its name: 64x256x16, or 16816 for 16 x 8 x 16."""
    if shape := re.search(r"(\d+)x(\d+)x(\d+)", instruction.name):
        return math.prod(map(int, shape.groups()))
    shape = re.search(r"\.(\d{3,5})\b", instruction.name)
    return int(shape[1]) if shape else 0


def _operands(tensor: list[Instruction]) -> str | None:
    """Where A comes from. wgmma names it second, Blackwell's tcgen05 (UTC...) first."""
    for x in tensor:
        operands = x.operands.split(", ")
        a = operands[0] if x.name.startswith("UTC") else operands[1]
        if a.startswith("gdesc"):  # the descriptor of a tile in shared memory
            return "shared"
        if x.name.startswith("UTC"):
            return "tensor memory"
        if re.match(r".GMMA", x.name):
            return "registers"
    return None


def _serialised(body: list[Instruction]) -> bool:
    """Whether each wgmma of the loop waits for the one before.

    A wgmma runs beside the program that issued it. One turn of a healthy loop issues all of its
    wgmma, be they 2, 4 or 8, between one WARPGROUP.ARRIVE and one WARPGROUP.DEPBAR, which lets the
    newest batch run on (gsb0, 0x1). Where ptxas cannot prove that nothing else touches the
    accumulators (its warning C7515), it gives every single wgmma an ARRIVE of its own and a DEPBAR
    that waits for it (gsb0, 0x0): 4 + 4 for 4 wgmma. That was found in the code of triton 3.6.0 for
    a matmul with transposed B in 128x256 tiles, and with 3.6.0 and 3.9.0 in tiles that spill.
    """
    wgmma = sum(_is(x, r"[BDHIOQ]GMMA") for x in body)
    return wgmma > 1 and sum(x.name == "WARPGROUP.ARRIVE" for x in body) >= wgmma


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_WIDTHS |= {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2}
_WIDTHS |= {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _narrowest(instructions: list[Instruction], what: str) -> int | None:
    """Bytes a thread of the narrowest "load" or "store"; None if there is none."""
    if what == "load":
        chosen = [x for x in instructions if _group(x) == "load"]
    else:
        chosen = [x for x in instructions if _is(x, STORES)]
    return min(map(_width, chosen), default=None)


def _width(instruction: Instruction) -> int:
    if _is(instruction, r"UTMA\w+|UBLKCP"):
        return 16
    parts = re.split(r"[._]", instruction.name)
    return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)


# -------------------------------------------------------------------------------------------------
# Loops.
# -------------------------------------------------------------------------------------------------


def main_loop(code: Code) -> list[int] | None:
    """Which instructions are the main loop, in order; None if there is no loop.

    It is the innermost loop with tensor-core instructions, the one with most of them if there are
    several; without any it is the longest innermost loop. A loop that neither loads, stores nor
    computes only waits for something and does not count.
    """
    groups = [_group(x) for x in code.instructions]

    def works(loop: set[int]) -> bool:
        return any(groups[i] in WORKING or _is(code.instructions[i], STORES) for i in loop)

    def tensor_cores(loop: set[int]) -> int:
        return sum(groups[i] == "tensor core" for i in loop)

    loops = [loop for loop in find_loops(code) if works(loop)]
    if with_tensor_cores := [loop for loop in loops if tensor_cores(loop)]:
        loops = with_tensor_cores
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    if not innermost:
        return None
    return sorted(max(innermost, key=lambda loop: (tensor_cores(loop), len(loop))))


def find_loops(code: Code) -> list[set[int]]:
    """Every natural loop, as the set of its instructions' places in the list."""
    after = _successors(code)
    before: list[list[int]] = [[] for _ in after]
    for i, targets in enumerate(after):
        for target in targets:
            before[target].append(i)
    loops: dict[int, set[int]] = {}  # by first instruction; two jumps back there are one loop
    for i in sorted(_reachable(after, 0)):
        for target in after[i]:
            if target <= i and i not in _reachable(after, 0, without=target):
                loops.setdefault(target, {target}).update(_reachable(before, i, without=target))
    return list(loops.values())


def _successors(code: Code) -> list[list[int]]:
    """Which instructions may run next after each. A call returns, so it is not followed."""
    after = []
    for i, x in enumerate(code.instructions):
        targets = []
        if _is(x, JUMPS):
            targets = [code.labels[label] for label in _labels(x) if label in code.labels]
        if _conditional(x) or not _is(x, f"{JUMPS}|{ENDS}"):
            targets.append(i + 1)
        after.append([t for t in targets if t < len(code.instructions)])
    return after


def _labels(jump: Instruction) -> list[str]:
    return re.findall(r"\.L\w+", jump.operands)


def _conditional(x: Instruction) -> bool:
    """Whether a jump or an end may be passed: `@P0 EXIT`, `BRA.U UP0, ...`, `s_cbranch_scc1`."""
    condition = x.name.startswith("BRA") and not x.operands.startswith("`")
    return bool(x.predicate) or condition or x.name.startswith("s_cbranch")


def _reachable(edges: list[list[int]], start: int, without: int | None = None) -> set[int]:
    seen: set[int] = set()
    todo = [start]
    while todo:
        i = todo.pop()
        if i != without and i not in seen and i < len(edges):
            seen.add(i)
            todo += edges[i]
    return seen


# -------------------------------------------------------------------------------------------------
# Parse.
# -------------------------------------------------------------------------------------------------


def parse_sass(text: str) -> Code:
    """The output of `nvdisasm -c`; with the lines of the source if it was called with `-gi` too."""
    code = Code([], {})
    lines: list[tuple[str, int]] = []  # of the annotations since the last instruction
    source = ("", 0)
    for line in text.splitlines():
        if location := re.search(r'//## File "([^"]*)", line (\d+)', line):
            lines.append((location[1], int(location[2])))
        elif label := re.match(r"(\.L\w+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+)?\s*([A-Z][\w.]*) ?(.*?)\s*;", line):
            # An inlined function comes first, then who called it: the first that is not triton's.
            if lines:
                source = next((x for x in lines if "/triton/language/" not in x[0]), lines[-1])
                lines = []
            predicate, name, operands = found.groups()
            code.instructions.append(Instruction(name, operands, predicate or "", source))
    if not code.instructions:
        raise PerfError("nvdisasm shows no instruction of this cubin")
    return code


def parse_amdgcn(text: str) -> Code:
    """AMD's assembly as LLVM prints it: instructions are indented by a tab, labels are not."""
    code = Code([], {})
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r"\t([a-z]\w+)\s*([^;]*)", line):
            code.instructions.append(Instruction(found[1], found[2].strip()))
    if not code.instructions:
        raise PerfError("no instruction in this AMD assembly")
    return code


# -------------------------------------------------------------------------------------------------
# Tools.
# -------------------------------------------------------------------------------------------------


def _tool(name: str, options: list[str], cubin: bytes) -> str:
    """What a tool of those that triton brings along says of a binary."""
    if not cubin:
        raise PerfError(f"no cubin to give to {name}: the kernel has no binary for an NVIDIA GPU")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            result = subprocess.run(
                [_tools() / name, *options, file.name], capture_output=True, text=True
            )
        except OSError as e:
            raise PerfError(f"cannot run {name}, which ships inside triton: {e}") from None
    if result.returncode != 0:
        words = (result.stderr or result.stdout).strip().replace(file.name, "the cubin")
        first = words.splitlines()[0] if words else f"it ended with {result.returncode}"
        raise PerfError(f"{name} cannot read this cubin: {first.split(' : ')[-1]}")
    return result.stdout


def _tools() -> pathlib.Path:
    spec = importlib.util.find_spec("triton")  # not imported: that would choose the interpreter
    if spec is None or not spec.submodule_search_locations:
        raise PerfError(
            "triton is not installed, and with it cuobjdump and nvdisasm: pip install it"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"

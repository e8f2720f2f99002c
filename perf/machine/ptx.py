"""Reads the text of a PTX kernel into instructions, labels and parameters.

PTX is the assembly language that Triton's compiler ends with and NVIDIA's ptxas begins with. It has
as many registers as it likes, each with a type by its declaration:

        .reg .b32   %r<234>;              234 registers of 32 bits, %r0 to %r233
        .loc 1 146 16                     what follows comes from line 146 of file 1
        ld.param.b32    %r17, [kernel_param_16];
    @%p7 bra            $L__BB0_6;        a guard: only the threads whose %p7 is true do it
    $L__BB0_6:                            a label

Only what Triton emits is read: one entry function, without calls. Inline assembly may open a scope
`{ .reg .pred done; wait: ... }`, whose names are local: they get a number to tell them apart.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tilelab.perf.machine.errors import UnknownInstruction

Place = tuple[str, int]  # a source file and a line of it


class Register(NamedTuple):
    """A register, also a special one (`%tid.x`); `_` throws away what is written to it."""

    name: str


class Immediate(NamedTuple):
    """A number in the text: an int, or the bits of a float with their width in bytes."""

    value: int
    float_bytes: int = 0


class Symbol(NamedTuple):
    """A name: a label, a parameter, or `global_smem`, where shared memory begins."""

    name: str


class Address(NamedTuple):
    """[base + offset] in bytes."""

    base: Register | Symbol | Immediate
    offset: int = 0


class Vector(NamedTuple):
    """{a, b, ...}: several registers as one operand."""

    items: tuple


class TensorAddress(NamedTuple):
    """[map, {coordinates}]: a box of a tensor, the innermost coordinate first."""

    base: Register | Symbol
    coordinates: tuple


class Pair(NamedTuple):
    """p|q: two destinations."""

    first: Register
    second: Register


Operand = Register | Immediate | Symbol | Address | Vector | TensorAddress | Pair


def names_of(operand: Operand) -> Iterator[str]:
    """The registers of an operand."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Address):
        yield from names_of(operand.base)
    elif isinstance(operand, TensorAddress):
        for part in (operand.base, *operand.coordinates):
            yield from names_of(part)
    elif isinstance(operand, (Vector, Pair)):
        for item in operand.items if isinstance(operand, Vector) else operand:
            yield from names_of(item)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        op: with all of its modifiers, "add.rn.f32".
        operands: destinations first.
        guard: (register, negated) or None.
        line: of the PTX text, from 1.
        source: where the code comes from; the function's own line first, then those that called it.
        text: as it is written, on one line.
    """

    op: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    line: int
    source: tuple[Place, ...]
    text: str

    @property
    def parts(self) -> list[str]:
        """The mnemonic and its modifiers."""
        return self.op.split(".")

    @property
    def where(self) -> str:
        """Source line and PTX line, for a message."""
        lines = " < ".join(f"{file}:{line}" for file, line in self.source)
        return f"{lines or 'unknown source'} (PTX line {self.line}: {self.text})"


class Parameter(NamedTuple):
    """A parameter of the kernel, at `offset` in the parameter space; `size` in bytes."""

    name: str
    type: str
    offset: int
    size: int


class Program(NamedTuple):
    """A kernel as it was parsed.

    Attributes:
        name: of its entry function.
        parameters: in order.
        threads: of a CTA.
        registers: the type of each register, without the dot: {"%r1": "b32"}.
        blocks: straight runs of instructions. A block ends before a label and behind whatever may
            send a thread elsewhere or make it wait.
        labels: the block that begins at each label.
        max_registers: of a thread at launch, where the kernel says so, else 0.
    """

    name: str
    parameters: tuple[Parameter, ...]
    threads: int
    registers: dict[str, str]
    blocks: list[list[Instruction]]
    labels: dict[str, int]
    max_registers: int

    def successors(self, number: int) -> list[int]:
        """The blocks that may run behind one."""
        last = self.blocks[number][-1] if self.blocks[number] else None
        follows = [number + 1] if number + 1 < len(self.blocks) else []
        if last is None or not last.op.startswith(("bra", "ret", "exit")):
            return follows
        there = [self.labels[last.operands[0].name]] if last.op.startswith("bra") else []
        return there + follows if last.guard else there


ENDS_BLOCK = ("bra", "ret", "exit", "bar", "barrier", "mbarrier.try_wait", "mbarrier.test_wait",
              "setmaxnreg", "trap")  # fmt: skip
_TOKEN = re.compile(r"[\[{(]|[\]})]|,|[^\[\]{}(),]+")


def parse(text: str) -> Program:
    """Parse the PTX of one kernel.

    Raises:
        UnknownInstruction: the text is not PTX as Triton emits it.
    """
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S)
    if not head:
        raise UnknownInstruction("no .entry function: this is not the PTX of a kernel")
    if re.search(r"^\s*(call|call\.uni)\b", text, re.M):
        raise UnknownInstruction(f"{head[1]} calls a function: only single functions are executed")
    for what in (".explicitcluster", ".reqnctapercluster"):
        if what in text:
            raise UnknownInstruction(f"{head[1]} runs in clusters of CTAs ({what}): not supported")
    size = re.search(r"\.(?:req|max)ntid\s+(\d+)", text)
    limit = re.search(r"\.maxnreg\s+(\d+)", text)
    registers: dict[str, str] = {}
    statements = list(_statements(text, head.end(), registers))
    targets = {
        operand.name
        for item in statements
        if not isinstance(item, str) and item.op.startswith("bra")
        for operand in item.operands
    }
    blocks, labels = [[]], {}
    for item in statements:
        if isinstance(item, str):
            if item not in targets:  # of debug information
                continue
            if blocks[-1]:
                blocks.append([])
            labels[item] = len(blocks) - 1
        else:
            blocks[-1].append(item)
            if item.op.startswith(ENDS_BLOCK) and not item.op.startswith("bar.warp"):
                blocks.append([])
    return Program(
        head[1], _parameters(head[2]), int(size[1]), registers, blocks, labels,
        int(limit[1]) if limit else 0,
    )  # fmt: skip


def _parameters(text: str) -> tuple[Parameter, ...]:
    found, offset = [], 0
    for declaration in filter(str.strip, text.split(",")):
        kind, bits = re.search(r"\.([busf])(\d+)\b", declaration).groups()
        align = re.search(r"\.align (\d+) \.b8", declaration)
        name, count = re.search(r"([\w$]+)(?:\[(\d+)\])?\s*$", declaration).groups()
        size = int(bits) // 8 * int(count or 1)
        offset = -(-offset // (step := int(align[1]) if align else size)) * step
        found.append(Parameter(name, kind + bits, offset, size))
        offset += size
    return tuple(found)


def _statements(text: str, start: int, registers: dict) -> Iterator[Instruction | str]:
    """Instructions and the names of labels, in order. Declarations go to `registers`."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    scopes: list[dict[str, str]] = [{}]  # names of inline assembly, and what they are called here
    source: tuple[Place, ...] = ()
    count, in_asm, waiting, begun = 0, False, "", 0
    for number, raw in enumerate(text[start:].splitlines(), text.count("\n", 0, start) + 1):
        if "inline asm" in raw:  # lines within it are not those of the source
            in_asm = "begin" in raw
        if raw.lstrip().startswith(".loc"):
            if not in_asm:
                source = _places(raw, files) or source
            continue
        line = raw.split("//")[0].strip()
        while line and scopes:
            if not waiting:
                if line[0] in "{}":
                    if line[0] == "{":
                        count += 1
                        scopes.append({"": str(count)})
                    else:
                        scopes.pop()
                    line = line[1:].lstrip()
                    continue
                if label := re.match(r"([$\w]+):(?!:)\s*", line):
                    yield _local(label[1], scopes, define=True)
                    line = line[label.end() :]
                    continue
                begun = number
            end = line.find(";")
            if end < 0:
                waiting += line + " "
                break
            statement, line = " ".join((waiting + line[:end]).split()), line[end + 1 :].lstrip()
            waiting = ""
            if statement.startswith(".reg"):
                _declare(statement, registers, scopes)
            elif statement and not statement.startswith("."):
                yield _instruction(statement, begun, source, scopes)
        if not scopes:
            return


def _places(text: str, files: dict[str, str]) -> tuple[Place, ...]:
    """The places of a `.loc` line: its own, then its callers'; none if it has no line."""
    own = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text)
    if own[2] == "0":
        return ()
    found = [(files.get(own[1], own[1]), int(own[2]))]
    found += [(files.get(f, f), int(n)) for f, n in re.findall(r"inlined_at\s+(\d+)\s+(\d+)", text)]
    if len(found) == 1:  # triton 3.6.0 has the callers in a comment
        found += [(name, int(n)) for name, n in re.findall(r"@\[ ([^:\s]+):(\d+)", text)]
    return tuple(found)


def _declare(statement: str, registers: dict[str, str], scopes: list[dict]) -> None:
    """`.reg .b32 %r<234>` declares 234 registers; `.reg .pred p, q` those named."""
    _, kind, names = statement.split(None, 2)
    for name in names.split(","):
        family = re.match(r"(.+)<(\d+)>$", name.strip())
        if family:
            registers |= {f"{family[1]}{i}": kind[1:] for i in range(int(family[2]))}
        else:
            registers[_local(name.strip(), scopes, define=len(scopes) > 1)] = kind[1:]


def _local(name: str, scopes: list[dict[str, str]], define: bool = False) -> str:
    """A name as it is known in all of the kernel."""
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    # A label may be used before it is met: whatever has no % or $ inside a scope is local to it.
    if len(scopes) > 1 and (define or re.match(r"[A-Za-z]\w*$", name)) and name[0] not in "%$":
        return scopes[-1].setdefault(name, f"{name}@{scopes[-1]['']}")
    return name


def _instruction(text: str, line: int, source: tuple, scopes: list[dict]) -> Instruction:
    found = re.match(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if not found:
        raise UnknownInstruction(f"PTX line {line}: cannot read {text!r}")
    negated, guard, op, rest = found.groups()
    operands = tuple(_operand(part, scopes) for part in _split(rest))
    named = (_local(guard, scopes), bool(negated)) if guard else None
    return Instruction(op, operands, named, line, source, text)


def _split(text: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    if "{" not in text and "[" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, current = [], 0, ""
    for token in _TOKEN.findall(text):
        depth += (token in "[{(") - (token in "]})") if len(token) == 1 else 0
        if token == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += token
    return [*parts, current.strip()] if current.strip() else parts


def _operand(text: str, scopes: list[dict]) -> Operand:
    if text[0] == "%" and "|" not in text:
        return Register(text)
    if text[0] == "{":
        return Vector(tuple(_operand(part, scopes) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, *coordinates = _split(text[1:-1])
        if coordinates:
            return TensorAddress(_operand(base, scopes), _operand(coordinates[0], scopes).items)
        base, _, offset = base.partition("+")
        return Address(_operand(base.strip(), scopes), int(offset.strip() or "0", 0))
    if "|" in text:
        return Pair(*(_operand(part.strip(), scopes) for part in text.split("|")))
    if bits := re.match(r"0([fFdD])([0-9A-Fa-f]+)$", text):
        return Immediate(int(bits[2], 16), 4 if bits[1] in "fF" else 8)
    if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", text):
        return Immediate(int(text.rstrip("U"), 0))
    if text == "_":
        return Register(text)
    name = _local(text, scopes)
    return Register(name) if "@" in name and not name.startswith("$") else Symbol(name)

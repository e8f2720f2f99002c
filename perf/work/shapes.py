"""Which sizes are measured: named sets, and ranges. `--shapes help` prints what `describe` returns.

square                         products of 256 ... 16384 squared
resnet50                       every layer of ResNet-50 that the operator has, batch 32 and 256
resnet50@64,vgg16@64           two sets, batch 64
resnet50_3x3@32                only its 3x3 convolutions; resnext50 and stems are such parts too
m=1024:8192:1024               a range, ends included: n and k follow m unless they are given
m=256*2:16384,k=64             doubling instead of adding
n=32,c=64,h=56,k=64,r=3,padding=1
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tilelab.perf.errors import PerfError
from tilelab.perf.work import networks
from tilelab.perf.work.networks import Network, Shape
from tilelab.perf.work.operators import OPERATORS

MOST = 10_000  # shapes of a range: more than that is a slip of the keyboard


class Set(NamedTuple):
    """A named set of shapes: what it is, batches unless one is asked for, the network it is of."""

    meaning: str
    batches: tuple[int, ...] = ()
    network: Callable[[], Network] | None = None


SETS = {
    "square": Set("products of 256, 512 ... 16384 squared"),
    "skinny": Set("products with one side much shorter or longer than the others"),
    "transformer": Set(
        "GPT-2 small and Llama 7B: layers, scores, vocabulary; 4096 tokens", (4096,)
    ),
    "resnet50": Set(
        "ResNet-50 for 224 x 224 images, as torchvision has it", (32, 256), networks.resnet50
    ),
    "vgg16": Set(
        "VGG-16 for 224 x 224 images; conv2d_relu_pool where a pool follows",
        (32, 256),
        networks.vgg16,
    ),
    "alexnet": Set(
        "AlexNet of one tower for 224 x 224 images, as torchvision has it",
        (32, 256),
        networks.alexnet,
    ),
    "mobilenet": Set("depthwise layers of MobileNet v1 and v2, 224 x 224, batch 32", (32,)),
    "demo": Set("the CNN that nets/train.py trains, batch 64", (64,), networks.demo),
    "resnet50_3x3": Set("the 3x3 convolutions of ResNet-50", (32, 256), networks.resnet50_3x3),
    "resnext50": Set(
        "the grouped convolutions of ResNeXt-50 32x4d: 3x3, 32 groups",
        (32, 256),
        networks.resnext50,
    ),
    "stems": Set(
        "three channels in: the first layers of ResNet-50, AlexNet and VGG-16",
        (32, 256),
        networks.stems,
    ),
    "classes": Set("4096 rows of 10, 100, 1000, 4096, 16384 and 50257 classes", (4096,)),
    "tiny": Set("sizes that divide nothing; seconds in the interpreter"),
}


def shapes(op: str, text: str) -> list[Shape]:
    """What `text` stands for, each shape once.

    Args:
        op: the operator.
        text: names of sets with commas between them, each with "@" and a batch if wanted; or sizes
            as `key=value`, `key=start:stop:step` or `key=start*factor:stop`.

    Raises:
        PerfError: for an unknown operator, set or key, for sizes that do not fit each other, and
            for a set that has nothing for this operator.
    """
    if op not in OPERATORS:
        raise PerfError(f"unknown operator {op!r}: there are {', '.join(OPERATORS)}")
    found = _range(op, text) if "=" in text else _sets(op, text)
    once: dict[tuple, Shape] = {}
    for shape in found:
        problem = _misfit(op, shape.sizes)
        if problem:
            raise PerfError(f"{op} {shape.name}: {problem}")
        once.setdefault(tuple(shape.sizes.items()), shape)
    return list(once.values())


def describe() -> str:
    """Return a table of the sets: what each is, and for which operators."""
    lines = ["set          what it is", ""]
    for name, (meaning, *_) in SETS.items():
        lines.append(f"{name:12} {meaning}")
        counts = {op: len(_set(op, name, (32,))) for op in OPERATORS}
        groups = [f"{op} {count}" for op, count in counts.items() if count]
        text = ", ".join(groups)
        while len(text) > 80:
            end = text.rindex(", ", 0, 80)
            lines.append(f"{'':12} {text[: end + 1]}")
            text = text[end + 2 :]
        lines += [f"{'':12} {text}", ""]
    lines += [
        "After each operator: how many shapes. Networks have as many for each batch, 32 and 256",
        "unless given: resnet50@64. In transformer the batch is the tokens, in classes the rows.",
        "",
        "Or sizes, a range of one or more of them, ends included:",
        "  m=1024:8192:1024,n=4096,k=64      m=256*2:16384 (doubling; n and k follow m)",
        "  n=32,c=64,h=56,k=64,r=3,padding=1 (w follows h, s follows r, stride and dilation are 1)",
    ]
    return "\n".join(lines)


def _sets(op: str, text: str) -> Iterator[Shape]:
    for part in text.split(","):
        name, at, batch = part.strip().partition("@")
        if name not in SETS:
            raise PerfError(f"unknown set of shapes {name!r}: there are {', '.join(SETS)}")
        if at and not SETS[name].batches:
            have = [other for other, about in SETS.items() if about.batches]
            raise PerfError(f"{part}: {name} has no batch; {', '.join(have)} have")
        if at and not (batch.isascii() and batch.isdigit() and int(batch) > 0):
            raise PerfError(f"{part}: the batch after @ must be a positive number")
        found = _set(op, name, (int(batch),) if at else SETS[name].batches)
        if not found:
            have = [other for other in SETS if _set(op, other, (32,))]
            raise PerfError(f"{name} has no shapes for {op}; these have: {', '.join(have)}")
        yield from found


def _set(op: str, name: str, batches: tuple[int, ...]) -> list[Shape]:
    """The shapes that an operator has in a set."""
    row = OPERATORS[op]
    if name == "tiny":
        every = (dict(zip(row.sizes, sizes, strict=True)) for sizes in row.tiny)
        return [Shape(f"tiny {i}", sizes) for i, sizes in enumerate(every, start=1)]
    make = row.sets.get(name)
    if make is None and SETS[name].network:
        make = functools.partial(_layers, row.layer, name, SETS[name].network())
    return [shape for N in batches or (0,) for shape in make(N)] if make else []


def _layers(sizes_of: Callable, name: str, network: Network, N: int) -> list[Shape]:
    """What a network's layers mean for an operator, equal ones once and counted."""
    found: dict[tuple, Shape] = {}
    for layer, following in itertools.zip_longest(network.layers, network.layers[1:]):
        sizes = sizes_of(layer, following, N)
        if sizes:
            same = tuple(sizes.values())
            first = found.get(same, Shape(f"{network.called or name}.{layer.name} n{N}", sizes, 0))
            found[same] = first._replace(count=first.count + 1)
    return list(found.values())


# -------------------------------------------------------------------------------------------------
# Ranges
# -------------------------------------------------------------------------------------------------


def _range(op: str, text: str) -> list[Shape]:
    """Return every combination of the given sizes."""
    keys = {key.lower(): key for key in OPERATORS[op].sizes}
    given: dict[str, list[int]] = {}
    for part in text.split(","):
        name, equals, values = part.strip().partition("=")
        if not equals:
            raise PerfError(f"{text}: {part!r} is no size; sets and sizes do not mix")
        if name.lower() not in keys:
            raise PerfError(f"{op} has no size {name!r}: it has {', '.join(OPERATORS[op].sizes)}")
        if keys[name.lower()] in given:
            raise PerfError(f"{text}: {name} is given twice")
        given[keys[name.lower()]] = _values(part.strip(), values)
    defaults = OPERATORS[op].implied
    missing = [key for key in OPERATORS[op].sizes if key not in given and key not in defaults]
    if missing:
        raise PerfError(f"{text}: {op} needs {', '.join(missing)} too")
    total = 1
    for values in given.values():
        total *= len(values)
    if total > MOST:
        raise PerfError(f"{text}: {total} shapes; at most {MOST}")
    found = []
    for combination in itertools.product(*given.values()):
        sizes = dict(zip(given, combination, strict=True))
        for key, value in defaults.items():
            sizes.setdefault(key, sizes[value] if isinstance(value, str) else value)
        sizes = {key: sizes[key] for key in OPERATORS[op].sizes}
        found.append(Shape(" ".join(f"{key}={value}" for key, value in sizes.items()), sizes))
    return found


def _values(part: str, text: str) -> list[int]:
    """Return the values of "7", "1024:8192:1024" or "256*2:16384", ends included."""
    match = re.fullmatch(r"(\d{1,12})(?:\*(\d+):(\d{1,12})|:(\d{1,12}):(\d+))?", text, re.ASCII)
    if not match:
        raise PerfError(f"{part}: a size is 7, 1024:8192:1024 (start:stop:step) or 256*2:16384")
    start, factor, last, stop, step = (int(group) if group else None for group in match.groups())
    if factor is not None:
        if start < 1 or factor < 2 or last < start:
            raise PerfError(f"{part}: this range is empty, or without an end")
        values = [start]
        while values[-1] * factor <= last:
            values.append(values[-1] * factor)
        return values
    if step is not None:
        if step < 1 or stop < start:
            raise PerfError(f"{part}: this range is empty, or without an end")
        if (stop - start) // step >= MOST:
            raise PerfError(f"{part}: {(stop - start) // step + 1} shapes; at most {MOST}")
        return list(range(start, stop + 1, step))
    return [start]


def _misfit(op: str, sizes: dict[str, int]) -> str | None:
    """Why these sizes do not make a workload."""
    for key, value in sizes.items():
        if value < (0 if key == "padding" else 1):
            return f"{key} must be positive, got {value}"
    return OPERATORS[op].misfit(sizes)

"""How wide every tile of the memory-bound kernels loads and stores, compiled for a GPU.

    TRITON_INTERPRET=0 python -m tests.tools.memory_bound sm_90 bfloat16 [name ...]

test_memory_bound.py runs this in a process of its own, see aot.py. The report is a JSON list with a
dict a kernel. Its "accesses" are the bulk ones: loads and stores of a tile's full size, each with
the bytes a thread of its instructions. What one row or one column has (a class, a loss, a bias, a
sum) is not among them, nor what kernels/optim.py does under a mask, to a parameter's last chunk.

Which instruction belongs to which load goes by the line of the source: Triton's IR says how many
elements a load has, and the assembly (PTX) how many bytes an instruction.
"""

import contextlib
import importlib
import json
import math
import re
import sys
from collections import defaultdict

import torch
from tilelab.kernels import _launch, _tiles
from tilelab.perf.compiler import aot

from tests.tools.aot import images, train
from tilelab import kernels

ROWS = 4096


def tiles_of(module):
    module = importlib.import_module(f"tilelab.kernels.{module}")
    return getattr(module, "UNPOOL_TILES", module.TILES)


def logits(n, dtype):
    return torch.empty(ROWS, n, dtype=dtype)


def rows_for(tile):
    """How long the rows are that a tile is for: as it, or several of its blocks if it is online."""
    online = tile == importlib.import_module("tilelab.kernels.softmax").ONLINE
    return tile["BLOCK_N"] * (5 if online else 1) - 16


def softmax(tile, dtype):
    if tile == importlib.import_module("tilelab.kernels.softmax").STRIDED:
        return train(kernels.softmax, torch.empty(8, 64, 56, 56, dtype=dtype), dim=1)
    return train(kernels.softmax, logits(rows_for(tile), dtype))


def cross_entropy(tile, dtype):
    if tile == importlib.import_module("tilelab.kernels.softmax").STRIDED:
        x, t = torch.empty(8, 64, 56, 56, dtype=dtype), torch.zeros(8, 56, 56, dtype=torch.int64)
    else:
        x, t = logits(rows_for(tile), dtype), torch.zeros(ROWS, dtype=torch.int64)
    return train(kernels.cross_entropy, x, t)


def bias_relu(tile, dtype):
    C = max(64, tile["BLOCK_N"]) if tile["BLOCK_N"] > 16 else 16
    bias = torch.empty(C, dtype=dtype)
    train(kernels.bias_relu, images(64, C, 56, 56, dtype=dtype), bias)
    train(kernels.bias_relu, torch.empty(ROWS, C, dtype=dtype), bias)
    if tile["BLOCK_M"] >= 16:  # or a tile has fewer pixels side by side than a load could hold
        train(kernels.bias_relu, torch.empty(64, C, 56, 56, dtype=dtype), bias)


def max_pool2d(tile, dtype, **window):
    C = max(64, tile["BLOCK_N"]) if tile["BLOCK_N"] > 16 else 16
    train(kernels.max_pool2d, images(32, C, 56, 56, dtype=dtype), **window)


def step(optimizer, dtype, **options):
    p = torch.nn.Parameter(torch.empty(2**20, dtype=dtype))
    p.grad = torch.empty_like(p)
    optimizer([p], **options).step()


def step_of_copies(optimizer, dtype, **options):
    """In a network that computes in `dtype`, with parameters in float32, in a CUDA graph."""
    p = torch.nn.Parameter(torch.empty(2**20))
    optimizer = optimizer([p], lr=torch.tensor(0.1), **options)
    optimizer.make_copies(dtype)[p].grad = torch.empty(2**20, dtype=dtype)
    optimizer.step()


def im2col(tile, dtype):
    x = images(32, 64, 28, 28, dtype=dtype)
    train(kernels.im2col, x, kernel_size=3, padding=1)


def depthwise(tile, dtype, stride=1):
    """Without a gradient: that of a depthwise convolution is not bound by memory yet."""
    C = max(64, tile["BLOCK_N"]) if tile["BLOCK_N"] > 32 else 32
    x, weight = images(256, C, 112, 112, dtype=dtype), torch.empty(C, 1, 3, 3, dtype=dtype)
    kernels.conv2d(x, weight, torch.empty(C, dtype=dtype), stride, 1, 1, C, "relu")


def unpool(tile, dtype):
    """By the bias gradient alone: nothing is multiplied. 57 rows: the last has no window."""
    K = max(64, tile["BLOCK_N"])
    dy, place = images(64, K, 28, 28, dtype=dtype), images(64, K, 28, 28, dtype=torch.uint8)
    weight = images(K, 64, 3, 3, dtype=dtype)
    geometry = [64, 64, 57, 56], [1, 1], [False, False, True], False
    torch.ops.tilelab.conv2d_relu_pool_backward(dy, place, None, weight, *geometry)


# By name: the file whose tiles are tried, whose they are, and a call that launches its kernels.
CASES = {
    "bias_relu": ("bias_relu", ("bias_relu", "bias_relu_backward"), bias_relu),
    "softmax": ("softmax", ("softmax", "softmax_backward"), softmax),
    "cross_entropy": ("softmax", ("cross_entropy", "cross_entropy_backward"), cross_entropy),
    "max_pool2d, 2x2": (
        "pool",
        ("max_pool2d", "max_pool2d_backward"),
        lambda tile, dtype: max_pool2d(tile, dtype, kernel_size=2),
    ),
    "max_pool2d, 3x3 at stride 2": (
        "pool",
        ("max_pool2d", "max_pool2d_backward"),
        lambda tile, dtype: max_pool2d(tile, dtype, kernel_size=3, stride=2, padding=1),
    ),
    "conv2d_relu_pool's scatter": ("conv2d_relu_pool_grad", ("unpool",), unpool),
    "SGD": ("optim", ("sgd",), lambda tile, dtype: step(kernels.SGD, dtype, momentum=0.9)),
    "AdamW": ("optim", ("adamw",), lambda tile, dtype: step(kernels.AdamW, dtype)),
    "SGD of copies": (
        "optim",
        ("sgd",),
        lambda tile, dtype: step_of_copies(kernels.SGD, dtype, momentum=0.9),
    ),
    "AdamW of copies": (
        "optim",
        ("adamw",),
        lambda tile, dtype: step_of_copies(kernels.AdamW, dtype, capturable=True),
    ),
    "im2col": ("im2col", ("im2col", "col2im"), im2col),
    "conv2d, depthwise": ("conv2d_depthwise", ("conv2d_depthwise",), depthwise),
    "conv2d, depthwise at stride 2": (
        "conv2d_depthwise",
        ("conv2d_depthwise",),
        lambda tile, dtype: depthwise(tile, dtype, stride=2),
    ),
}


def launches(name, tile, dtype):
    """What one case launches with one tile; nothing is launched."""
    _, ops, call = CASES[name]
    with contextlib.ExitStack() as stack:
        for op in ops:
            stack.enter_context(_tiles.use_tile(op, tile))
        events = stack.enter_context(_launch.record())
        call(tile, dtype)
    return [e for e in events if isinstance(e, _launch.Launch)]


def bulk(ttir):
    """The loads and stores of most elements: {("load", line): (elements, bytes an element)}."""
    places = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", ttir, re.M))

    def line(place):
        text = places[place]
        if found := re.match(r'"[^"]*":(\d+):', text):
            return int(found[1])
        caller = re.match(r'(?:callsite\(#loc\d* at |"[^"]*"\()#(loc\d*)\)', text)
        return line(caller[1])

    found = []
    accesses = re.finditer(r"tt\.(load|store) ([^:\n]*) : tensor<(\S+?)> loc\(#(loc\d*)\)", ttir)
    for kind, operands, type_, place in (m.groups() for m in accesses):
        *sizes, element = re.match(r"((?:\d+x)+)!tt\.ptr<\w*?(\d+)>?$", type_.rstrip(">")).groups()
        elements = math.prod(int(n) for n in sizes[0].split("x") if n)
        masked = len(operands.split(",")) > (1 if kind == "load" else 2)
        found.append((kind, line(place), elements, int(element) // 8, masked))
    most = max(elements for _, _, elements, _, _ in found)
    if not all(masked for *_, masked in found if _[2] == most):  # a branch without masks
        found = [x for x in found if not x[4]]
    return {(kind, at): (n, size) for kind, at, n, size, _ in found if n == most}


# Its own line and its caller's: `inlined_at 1 106 9`, with older tritons `// .. @[ file.py:106:9 ]`
LINE = r"\s*\.loc\s+\d+\s+(\d+)(?:.*(?:inlined_at\s+\d+\s+|@\[ [^:]*:)(\d+))?"


def widths(ptx):
    """Bytes a thread of the accesses to global memory: {("load", line): {16, ...}}."""
    found, at, in_asm = defaultdict(set), None, False
    for text in ptx.splitlines():
        if "inline asm" in text:  # within it the lines are not the source's
            in_asm = "begin" in text
        elif (place := re.match(LINE, text)) and not in_asm:
            at = int(place[2] or place[1])
        elif access := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s", text):
            kind = "load" if access[1] == "ld" else "store"
            found[kind, at].add(int(access[2] or 1) * int(access[3]) // 8)
    return found


def describe(launch):
    compiled = aot.compile_launch(launch)
    analysis = aot.analyse(compiled)
    counts = ("registers", "spills", "instructions", "loop_instructions")
    row = {key: analysis[key] for key in counts}
    row["loop"] = analysis["loop_instructions"] is not None
    if "ptx" not in compiled.asm:
        return row
    threads = 32 * compiled.metadata.num_warps
    found, row["accesses"], row["moved"] = widths(compiled.asm["ptx"]), {}, 0
    for (kind, line), (elements, size) in bulk(compiled.asm["ttir"]).items():
        name = f"{kind} of {elements // threads} x {size} bytes, line {line}"
        row["accesses"][name] = sorted(found.get((kind, line), ()))
        row["moved"] += elements * size // threads  # once, if there is no loop
    return row


def report(dtype, names):
    rows, seen = [], set()
    for name in names or CASES:
        for tile in tiles_of(CASES[name][0]):
            for launch in launches(name, tile, dtype):
                row = describe(launch)
                kernel = launch.kernel.__name__
                key = (name, str(tile), kernel, json.dumps(row))
                if key not in seen:
                    seen.add(key)
                    rows.append({"case": name, "tile": tile, "kernel": kernel} | row)
    return rows


if __name__ == "__main__":
    target, dtype, *names = sys.argv[1:]
    aot.compile_for(target)
    print(json.dumps(report(getattr(torch, dtype), names)))

"""What Triton makes of the tiles of the products: the data that a call's tile is chosen with.

    python -m tests.tools.tile_facts            compile one of each target, compare with the files
    python -m tests.tools.tile_facts --write    compile all tiles, and write the files

The files are kernels/tile_facts/<target>.json, and kernels/_tile_facts.py reads them. A file names
the version of triton, what the model knows of the GPU (perf/work/gpus.py), a hash of each kernel's
source, and the tiles. A tile is left out if it spills registers, has no tensor cores where there
are some, or does not fit on an SM. Each operator is compiled for one problem that divides into
whole tiles: a matmul in four layouts, a convolution of 3x3 windows in channels_last memory.

A tile with its sum in parts has the same loop as without, so it is compiled without.
"""

import argparse
import importlib
import json
import os
import random
import sys
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
from tqdm import tqdm

from tilelab import kernels
from tilelab.kernels import _launch, _tile_facts, _tiles
from tilelab.perf.compiler import aot, occupancy, prediction
from tilelab.perf.compiler.kernel_source import source_hash
from tilelab.perf.rows import results
from tilelab.perf.work import gpus

# isort: split
import triton  # after the kernels: they decide between interpreter and compiler

DTYPES = {
    "fp16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn, "int8": torch.int8,
}  # fmt: skip
# Without tensor cores a step is unrolled into multiply-adds: larger ones take minutes to compile.
# Of 255, by operator. A matmul's other layouts and epilogues take no more.
MOST_REGISTERS = {
    "conv2d": 224, "scaled_matmul": 224, "conv2d_input_grad": 239, "conv2d_weight_grad": 239,
}  # fmt: skip
TURNS, GRADIENTS = ("wgmma", "tcgen05"), ("conv2d_input_grad", "conv2d_weight_grad")
COMMAND = "make tile-facts"
MOST_UNROLLED = 64 * 128 * 32


class Case(NamedTuple):
    """One tile of one operator, to be compiled."""

    op: str
    kind: str
    layout: str
    tile: dict


def lists():
    """Yield the operators with a lesson's lists of tiles: TILES, FAST_TILES by bytes, kinds."""
    wide = ("fp16", "tf32", "fp32")
    for op, name, fast in (
        ("matmul", "matmul", "matmul_tma"),
        ("conv2d", "conv2d", "conv2d_tma"),
        ("conv2d_input_grad", "conv2d_input_grad", "conv2d_input_grad_tma"),
        ("conv2d_weight_grad", "conv2d_weight_grad", "conv2d_weight_grad_tma"),
    ):
        yield op, _lesson(name).TILES, _lesson(fast).FAST_TILES, wide
    scaled = _lesson("scaled_matmul")
    yield "scaled_matmul", scaled.TILES, scaled.FAST_TILES, ("fp8", "int8")


def _lesson(name):
    return importlib.import_module(f"tilelab.kernels.{name}")


def cases(target):
    """All cases of a target."""
    gpu, found = gpus.find(target), []
    for op, pointers, fast, kinds in lists():
        for kind in kinds:
            if kind not in gpu.rate and kind != "fp16":
                continue
            if kind == "fp8" and aot.device(target).capability < 89:  # scaled_matmul refuses it
                continue
            item = DTYPES[kind].itemsize
            tiles = [t for t in pointers if kind != "fp32" or _unrolls(t)]
            if item == 4:  # longer rows do not fit the widest swizzle: banks conflict
                tiles = [t for t in tiles if t["BLOCK_K"] <= 32]
            if kind != "fp32" and len(aot.device(target).kernels) > 1:
                tiles = tiles + [t for t in fast.get(item, []) if t["kernel"] != "tma_ws"]
            for tile in tiles:
                for layout in _layouts(op, kind, tile):
                    found.append(Case(op, kind, layout, tile))
    return found


def _unrolls(tile):
    m, n, k = (tile[f"BLOCK_{x}"] for x in "MNK")
    return m * n * k <= MOST_UNROLLED


def _layouts(op, kind, tile):
    """The layouts of a matmul's operands; TMA reads 32-bit and 8-bit ones along K alone."""
    if op == "scaled_matmul" or (op == "matmul" and kind == "tf32" and "kernel" in tile):
        return ("nt",)
    return ("nn", "nt", "tn", "tt") if op == "matmul" else ("",)


def call(case):
    """Call the operator on empty tensors of a size that every tile divides."""
    dtype = DTYPES[case.kind]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.kind == "tf32"
    if case.op in ("matmul", "scaled_matmul"):
        a, b = torch.empty(4096, 4096, dtype=dtype), torch.empty(4096, 4096, dtype=dtype)
        a = a if case.layout[0] == "n" else a.t()
        b = b if case.layout[1] == "n" else b.t()
        if case.op == "matmul":
            kernels.matmul(a, b)
        else:
            kernels.scaled_matmul(a, b, torch.ones(()), torch.ones(()))
        return
    x, weight = torch.empty(256, 256, 16, 16), torch.empty(256, 256, 3, 3)
    x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, weight))
    dy = torch.empty(256, 256, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    padding, rest = [1, 1], ([1, 1], 1)
    if case.op == "conv2d_input_grad":
        _lesson("conv2d_input_grad").conv2d_input_grad(
            dy, weight, list(x.shape), [1, 1], padding, *rest
        )
    elif case.op == "conv2d_weight_grad":
        _lesson("conv2d_weight_grad").conv2d_weight_grad(x, dy, weight, [1, 1], padding, *rest)
    else:
        kernels.conv2d(x, weight, None, 1, 1)


def fact(case, target):
    """The row of a case, or None if its tile is not to be chosen; and the kernel's name, hash."""
    tile = case.tile
    with _tiles.use_tile(case.op, tile), _launch.record(aot.device(target)) as events:
        call(case)
    choices = [e for e in events if isinstance(e, _launch.Choice) and e.op == case.op]
    assert choices, case
    main = aot._launch_of(events[events.index(choices[0]) :])
    aot.compile_for(target)
    hashed = main.kernel.__name__, source_hash(main.kernel)[:12]
    try:
        compiled = aot.compile_launch(main)
    except Exception as e:
        print(f"{target} {case}: {type(e).__name__}", file=sys.stderr)
        return None, hashed
    code = aot.analyse(compiled)
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    fits = occupancy.occupancy(target, threads, code["registers"], code["shared"])
    row = {
        "dtype": str(DTYPES[case.kind]).removeprefix("torch."), "tile": tile,
        "precision": "tf32" if case.kind == "tf32" else "ieee", "blocks_per_sm": fits.blocks,
        "limit": fits.limit, **code,
    }  # fmt: skip
    # Narrow elements that do not lie along K are turned on their way into shared memory, where
    # eight threads meet in each bank (docs/memory.md). The model does not know that.
    narrow = DTYPES[case.kind].itemsize != 2 and prediction.unit(code["tensor_core"]) in TURNS
    turned = case.layout not in ("", "nt") or case.op in GRADIENTS
    # Masks, and an activation in the epilogue, take more registers than were compiled.
    most = MOST_REGISTERS.get(case.op, 255)
    full = "kernel" not in tile and case.kind != "fp32" and code["registers"] > most
    if prediction.refused(row) or full or (narrow and turned and "kernel" not in tile):
        return None, hashed
    return {
        **case._asdict(), "item": DTYPES[case.kind].itemsize, "registers": code["registers"],
        "shared": code["shared"], "resident": fits.blocks,
        "instructions": code["loop_instructions"] or 0,
        "unit": prediction.unit(code["tensor_core"]),
    }, hashed  # fmt: skip


def gpu_facts(target):
    """What the model knows of the GPU that stands for a target."""
    gpu = gpus.find(target)
    kinds = {"fp16": "bf16", "tf32": "tf32", "fp32": "fp32", "fp8": "fp8", "int8": "int8"}
    known = {k: prediction.processor(gpu, v) for k, v in kinds.items() if v in gpu.rate}
    return {
        "name": gpu.name, "sms": gpu.sms, "clock": gpu.fma_clock_mhz * 1e6,
        "bandwidth": gpu.bandwidth, "rate": {k: p.rate for k, p in known.items()},
        "peak": {k: p.ceiling for k, p in known.items()},
    }  # fmt: skip


def make(target, found=None):
    """The content of a target's file, compiled."""
    rows, hashes = [], {}
    found = cases(target) if found is None else found
    for case in tqdm(found, desc=target, unit="tile"):
        row, (name, hashed) = fact(case, target)
        hashes[name] = hashed
        rows += [row] if row else []
    return {
        "triton": triton.__version__, "gpu": gpu_facts(target),
        "kernels": dict(sorted(hashes.items())), "tiles": rows,
    }  # fmt: skip


def read(target):
    return json.loads((_tile_facts.FOLDER / f"{target}.json").read_text())


def write(target, content):
    """Write a file whole, one tile a line."""
    tiles = ",\n".join("  " + json.dumps(row) for row in content["tiles"])
    head = {k: v for k, v in content.items() if k != "tiles"}
    text = json.dumps(head, indent=1)[:-2] + ',\n "tiles": [\n' + tiles + "\n ]\n}\n"
    results.write_whole(_tile_facts.FOLDER / f"{target}.json", text.encode())


def _kernel(name):
    """The kernel of this name, of whichever lesson has it."""
    lessons = (_lesson(op + end) for op, *_ in lists() for end in ("", "_tma"))
    return next(getattr(lesson, name) for lesson in lessons if hasattr(lesson, name))


def differences(target, sample=None):
    """What a file says otherwise than the compiler: of all tiles, or of a random sample."""
    committed, found = read(target), cases(target)
    known = {json.dumps(Case(*(r[f] for f in Case._fields))): r for r in committed["tiles"]}
    wrong = [k for k in known if json.loads(k) not in [list(c) for c in found]]
    wrong = [f"{k} is in no lesson's list" for k in wrong]
    if committed["gpu"] != json.loads(json.dumps(gpu_facts(target))):
        wrong.append("gpu is not what perf/work/gpus.py says")
    for name, hashed in committed["kernels"].items():
        if source_hash(_kernel(name))[:12] != hashed:
            wrong.append(f"{name} has changed since")
    if committed["triton"] != triton.__version__:
        return wrong  # another triton makes other code
    if sample is not None:
        found = random.sample(found, sample)
    again = make(target, found)
    for row in again["tiles"]:
        key = json.dumps(Case(*(row[f] for f in Case._fields)))
        if known.get(key) != row:
            wrong.append(f"{key}: {known.get(key)}, compiled again {row}")
    return wrong


def main():
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="compile all, and write the files")
    parser.add_argument("--targets", default=",".join(gpus.TARGETS))
    args = parser.parse_args()
    for target in args.targets.split(","):
        if args.write:
            write(target, make(target))
        elif wrong := differences(target, 1):
            sys.exit("\n".join([f"{target}.json is not what triton makes: {COMMAND}", *wrong]))


if __name__ == "__main__":
    main()

"""What a tile does, in words: what the compiler made of it, what it will wait for, what to try.

Every sentence has its number, and a rule of thumb where there is one, so that it can be checked.
"""

import math
import pathlib
import textwrap

from tilelab.perf.compiler.prediction import L2_BYTES_PER_CLOCK, SCHEDULERS
from tilelab.perf.work.gpus import GPU, kind


def words(row: dict, gpu: GPU) -> str:
    """A compiled row (see perf/commands/compile.py) in some ten sentences, for a terminal."""
    tile = ", ".join(f"{name}={value}" for name, value in row["tile"].items())
    what = f"{row['op']} {row['mode']} {row['dtype']}, {row['shape_name']}"
    head = f"{what}, for the {gpu.title}\n{tile}"
    if row.get("failed"):
        return f"{head}\n\n  - BAD: {row['failed']}"
    said = [*_work(row, gpu), *_resources(row), *_loop(row), *_grid(row, gpu), *_time(row)]
    paragraphs = [
        textwrap.fill(s, 96, initial_indent="  - ", subsequent_indent="    ") for s in said
    ]
    return head + "\n\n" + "\n".join(paragraphs)


def _work(row: dict, gpu: GPU) -> list[str]:
    """How much there is to do, and which ceiling that means."""
    intensity = row["flops"] / row["bytes"]
    peak = gpu.peak(kind(row["dtype"], row["precision"]))
    ridge = peak / gpu.bandwidth
    which = "the arithmetic" if intensity > ridge else "memory"
    said = [
        f"The work: {row['flops'] / 1e9:.4g} GFLOP over at least {row['bytes'] / 1e6:.4g} MB, "
        f"{intensity:.4g} FLOPs a byte. The GPU does {ridge:.0f} in the time of a byte, so {which} "
        "is the ceiling."
    ]
    if row["moved"] > 1.05 * row["bytes"]:
        said.append(
            f"Its {row['launches']} launches move {row['moved'] / row['bytes']:.2f} times that "
            "minimum: intermediate results are written and read again."
        )
    return said


def _resources(row: dict) -> list[str]:
    said = []
    if row["spills"]:
        said.append(
            f"BAD: {row['spills']} bytes a thread are spilled to memory for want of registers. "
            "Use more warps, or a smaller BLOCK_M x BLOCK_N."
        )
    if row["blocks_per_sm"] == 0:
        return [*said, f"BAD: it cannot be launched: {row['limit']}."]
    accumulator = ""
    if "BLOCK_K" in row["tile"]:
        per_thread = row["tile"]["BLOCK_M"] * row["tile"]["BLOCK_N"] / row["threads"]
        accumulator = f", of which the accumulator takes {per_thread:.0f}"
    said.append(
        f"{row['registers']} registers a thread{accumulator}; {row['shared'] / 1024:.1f} KiB of "
        f"shared memory a program."
    )
    low = row["occupancy"] < 0.25 and "BLOCK_K" not in row["tile"]
    said.append(
        f"{row['blocks_per_sm']} x {row['tile'].get('num_warps', 4)} warps fit an SM: "
        f"occupancy {row['occupancy']:.0%}, limited by {row['limit']}."
        + (" LOW: too few loads are in flight to hide the memory's latency." if low else "")
    )
    return said


def _loop(row: dict) -> list[str]:
    said = []
    product = "BLOCK_K" in row["tile"]
    core = row.get("tensor_core")
    if product and core is None:
        said.append("BAD: no tensor cores: products are done one by one.")
    if core:
        where = f", its first operand from {row['operands']}" if row.get("operands") else ""
        said.append(f"Tensor cores: {core}, {row['tensor_cores_in_loop']} in the main loop{where}.")
    if row.get("serialised"):
        said.append("BAD: the wgmma instructions are serialised, each waits for the one before.")
    width = row.get("load_bytes")
    if width:
        how = "TMA" if row.get("tma") else f"{width} bytes a thread at the narrowest"
        bad = " NARROW: 16 are possible where the addresses allow it." if width < 16 else ""
        said.append(f"Loads: {how}.{bad}")
    if row.get("loop_instructions"):
        mix = ", ".join(f"{n} {name}" for name, n in (row.get("loop_mix") or {}).items() if n)
        said.append(f"The main loop has {row['loop_instructions']} instructions ({mix}).")
    return said


def _grid(row: dict, gpu: GPU) -> list[str]:
    said = []
    if row.get("waves") is None or row["blocks_per_sm"] == 0:
        return said
    idle = 1 - row["wave_efficiency"]
    bad = ""
    if idle > 0.15:
        bad = " BAD" if idle > 0.3 else ""
        bad += f": the busiest SM has {math.ceil(row['programs'] / gpu.sms)}, and {idle:.0%} of the"
        bad += " SMs' time is idle. Smaller tiles or a split sum would fill it"
    said.append(
        f"{row['programs']} programs on {gpu.sms} SMs, {row['blocks_per_sm']} at a time on each: "
        f"{row['waves']:.2f} waves{bad}."
    )
    if row["padding"] > 1.02:
        said.append(
            f"Tiles cover {row['padding']:.2f} times the work: blocks do not divide the sizes "
            + ", ".join(f"{k}={v}" for k, v in row["sizes"].items())
            + "."
        )
    return said


def _time(row: dict) -> list[str]:
    if "predicted_s" not in row:
        return []
    meaning = {
        "compute": "the tensor cores' rate (or the FMA units')",
        "memory": "device memory",
        "l2": f"L2, at {L2_BYTES_PER_CLOCK} bytes a clock and SM: larger tiles read less",
        "issue": f"issuing the loop's instructions, {SCHEDULERS} a clock and SM",
        "launch": "launching",
    }[row["bound"]]
    speed = f"{row['predicted_tflops']:.0f} TFLOP/s"
    if row["flops"] / row["bytes"] < 20:
        speed = f"{row['predicted_gbps']:.0f} GB/s"
    return [
        f"Predicted, not measured: {row['predicted_s'] * 1e6:.1f} us, {speed}; "
        f"what it waits for is {meaning}."
    ]


def annotated(loop: list[tuple[str, int, str]]) -> str:
    """The main loop's instructions, and beside them the source lines that they come from."""
    if not loop:
        return "\nThere is no loop to show, or no line information for this target."
    sources: dict[str, list[str]] = {}
    lines, before = ["", "The main loop, and where it comes from:"], None
    for file, number, instruction in loop:
        path = pathlib.Path(file)
        if file not in sources:
            sources[file] = path.read_text().splitlines() if path.is_file() else []
        source = ""
        if (file, number) != before:
            text = sources[file][number - 1].strip() if 0 < number <= len(sources[file]) else ""
            source = f"{path.name}:{number}  {text}"
        before = file, number
        lines.append(f"  {instruction:48.48}  {source}".rstrip())
    return "\n".join(lines)

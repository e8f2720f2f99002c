"""Which of a lesson's tiles is fastest for one call, by the model and what the compiler has found.

tile_facts/<target>.json has, for each tile of the lessons' lists, what Triton made of it:
registers, shared memory, instructions of its main loop, and how many programs fit on an SM. The
model of _cost_model.py turns these into a time for the sizes at hand. `make tile-facts` writes the
files; a test compiles some tiles again and compares.

The model takes 20 to 40 us a tile. So each lesson remembers its answers, and a shape that it has
seen costs as much as looking into a dict.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from tilelab.kernels import _cost_model as model
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import cdiv

FOLDER = pathlib.Path(__file__).parent / "tile_facts"
# The second kernel of a sum in parts: its launch, and the part that each thread adds up. A load
# takes LATENCY clocks, and eight of them are under way.
LAUNCH_S, PART_CLOCKS = 2.5e-6, model.LATENCY / 8


class Work(NamedTuple):
    """What a call computes with one tile.

    Attributes:
        tiles: of the result.
        steps: of the whole sum of one tile, without parts.
        results: elements of the result.
        moved: bytes of the operands and the result.
        ahead: whether loads begin before the step that needs them.
    """

    tiles: int
    steps: float
    results: int
    moved: int
    ahead: bool = True


class Facts(NamedTuple):
    """One tile as it was compiled: its main loop, for one layout of the operands."""

    tile: dict
    loop: model.Loop


class Table(NamedTuple):
    """The facts of one target, by operator, kind of arithmetic and layout."""

    gpu: dict
    facts: dict[tuple[str, str, str], list[Facts]]

    def processor(self, kind: str, sms: int) -> model.GPU:
        """Return the model's GPU for one kind of arithmetic and a number of SMs."""
        rate, peak = self.gpu["rate"][kind], self.gpu["peak"][kind]
        share = sms / self.gpu["sms"]
        return model.GPU(sms, self.gpu["clock"], rate, self.gpu["bandwidth"], peak * share)


@functools.cache
def table(target: str) -> Table | None:
    """Return the facts for a target, or None if there are none."""
    path = FOLDER / f"{target}.json"
    if not target or not path.exists():
        return None
    content = json.loads(path.read_text())
    facts: dict[tuple[str, str, str], list[Facts]] = {}
    for row in content["tiles"]:
        key = row["op"], row["kind"], row["layout"]
        facts.setdefault(key, []).append(Facts(row["tile"], _loop(row)))
    return Table(content["gpu"], facts)


def has(target: str, tile: dict) -> bool:
    """Return whether a target has facts of this tile, whatever its number of parts."""
    found, parts = table(target), {"SPLIT_K": 1} if "SPLIT_K" in tile else {}
    every = found.facts.values() if found else ()
    return any(tile | parts == each.tile for facts in every for each in facts)


def _loop(row: dict) -> model.Loop:
    tile, item = row["tile"], row["item"]
    m, n, k = (tile[f"BLOCK_{x}"] for x in "MNK")
    by_layout = "kernel" not in tile and row["layout"]
    run_a, run_b = (
        (item * tile[block] for block in along(row["layout"])) if by_layout else (128, 128)
    )
    specialized = tile.get("kernel") == "tma_ws"
    return model.Loop(
        m, n, k, item, tile["num_warps"] * (2 if specialized else 1), tile["num_stages"],
        row["instructions"], row["unit"], row["resident"], run_a, run_b,
        tile.get("kernel", "pointer"), bool(tile.get("PROGRAMS_PER_SM")),
    )  # fmt: skip


def seconds(loop: model.Loop, gpu: model.GPU, work: Work, parts: int = 1) -> float:
    """Return how long a call takes with a tile, its sum in so many parts."""
    if not work.ahead:
        loop = loop._replace(stages=1)
    moved = work.moved + (0 if parts == 1 else 4 * parts * work.results)
    terms = model.product_terms(loop, gpu, work.tiles * parts, cdiv(work.steps, parts), moved)
    first = model.together(*terms.values())
    if parts == 1:
        return first
    # The second kernel reads each part, in float32, and writes the result.
    memory = work.results * (4 * parts + loop.item) / (model.MEMORY_SHARE * gpu.bandwidth)
    return first + LAUNCH_S + max(memory, parts * PART_CLOCKS / gpu.clock)


def fastest_tile(
    device: Device,
    op: str,
    kind: str,
    work: Callable[[dict], Iterable[tuple[dict, Work, int]]],
    layout: str = "",
) -> dict | None:
    """Return the tile that the model finds fastest, or None if there are no facts.

    Args:
        device: the GPU.
        op: whose tiles.
        kind: of arithmetic, as `kind_of` says.
        work: returns what a tile can become for this call: tiles, each with its work and with the
            number of parts of its sum; none if it cannot compute the call.
        layout: of a matmul's operands, as `layout_of` says; "" for other operators.
    """
    found = table(device.target)
    if found is None:
        return None
    gpu = found.processor(kind, device.sms)
    best, least = None, math.inf
    for tile, loop in found.facts.get((op, kind, layout), ()):
        for variant, its_work, parts in work(tile):
            took = seconds(loop, gpu, its_work, parts)
            if took < least:
                best, least = variant, took
    return best


# Tiles were compiled for channels that every load finds whole. Others need masks and narrower
# loads, and with them registers that the facts know nothing of.
WHOLE = 16


@functools.lru_cache(maxsize=4096)
def pointer_tile(
    device: Device, op: str, kind: str, M: int, N: int, K: int, taps: float, times: int, moved: int,
    channels: int, parts: Callable[[int, int], int] = lambda tiles, steps: 1,
) -> dict | None:  # fmt: skip
    """Return the fastest tile of a convolution's kernel that loads through pointers.

    Return None if there are no facts for such tensors.

    Args:
        device: the GPU.
        op: whose tiles.
        kind: of arithmetic.
        M: the extent that BLOCK_M divides.
        N: that BLOCK_N divides.
        K: that BLOCK_K divides.
        taps: how often a tile goes through K.
        times: how many such products there are: one for each group, for example.
        moved: bytes of the operands and the result.
        channels: a divisor of the channels in and out; 1 if those of a pixel do not lie together.
        parts: returns the number of parts of the sum, of the number of tiles and of their steps.
    """
    if channels % WHOLE:
        return None

    def work(tile: dict) -> Iterable[tuple[dict, Work, int]]:
        if "kernel" not in tile:
            tiles = times * cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
            steps = taps * cdiv(K, tile["BLOCK_K"])
            yield tile, Work(tiles, steps, M * N, moved), parts(tiles, steps)

    return fastest_tile(device, op, kind, work)


def moved_by(*tensors: torch.Tensor) -> int:
    """Return the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def whole_channels(x: torch.Tensor, *channels: int) -> int:
    """Return the greatest divisor of all channels of a group, or 1 if x is not channels_last."""
    return math.gcd(*channels) if x.stride(1) == 1 else 1


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """Return the kind of arithmetic: "fp16" (any 16-bit), "tf32", "fp32", "fp8" or "int8"."""
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "fp32"
    return {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(dtype, "fp16")


def along(layout: str) -> tuple[str, str]:
    """Return which block of a tile lies along the contiguous dimension of A, and of B."""
    a, b = layout
    return "BLOCK_K" if a == "n" else "BLOCK_M", "BLOCK_K" if b == "t" else "BLOCK_N"


def layout_of(a_strides: tuple[int, int], b_strides: tuple[int, int]) -> str:
    """Return "n" or "t" for each operand of a @ b, as BLAS does for row-major memory.

    A is "n" if it is contiguous along K, and B if it is contiguous along N.
    """
    return ("n" if a_strides[1] == 1 else "t") + ("n" if b_strides[1] == 1 else "t")

"""Which tiles a sweep tries: a few values on each axis, and all their combinations."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Products: a tile is BLOCK_M x BLOCK_N of the result, BLOCK_K of the sum at a step.
PRODUCT = dict(
    BLOCK_M=(64, 128, 256),
    BLOCK_N=(64, 128, 256),
    BLOCK_K=(32, 64, 128),
    num_warps=(4, 8),
    num_stages=(3, 4, 5),
)
FLAT = dict(
    BLOCK_M=(64, 128, 256), BLOCK_N=(32, 64, 128), BLOCK_K=(16, 32, 64), num_warps=(4, 8),
    num_stages=(2, 3),
)  # fmt: skip
# The fused block has four accumulators, so its tiles are smaller.
FUSED = dict(
    BLOCK_M=(32, 64, 128), BLOCK_N=(16, 32, 64), BLOCK_K=(16, 32, 64), num_warps=(4, 8),
    num_stages=(2, 3),
)  # fmt: skip
# Memory-bound: only how many bytes a program has in flight, and how they lie.
ROWS = dict(BLOCK_M=(4, 8, 16, 32, 64, 128), BLOCK_N=(16, 64, 128, 256), num_warps=(2, 4, 8))
SOFTMAX = dict(
    BLOCK_M=(1, 2, 4, 8, 16, 32, 64),
    BLOCK_N=(16, 32, 128, 1024, 2048, 4096, 8192, 16384),
    num_warps=(4, 8, 16),
)
FEW_COLUMNS = dict(BLOCK_M=(*SOFTMAX["BLOCK_M"], 128, 256))
OPTIMIZER = dict(BLOCK_M=(256, 512, 1024, 2048, 4096, 8192), num_warps=(2, 4, 8, 16))
DEPTHWISE = dict(
    BLOCK_M=(16, 32, 64, 128), BLOCK_N=(32, 64, 128), PATCH_P=(1, 2), PATCH_Q=(2, 4), ROWS=(8, 16),
    num_warps=(2, 4),
)  # fmt: skip
# What an operator's other kernels have besides, where the GPU and the operands admit them.
FAST_AXES = dict(
    SUBTILES=(1, 2, 4),
    SPLIT_K=(1, 2, 4, 8, 16, 32, 64, 128),
    PROGRAMS_PER_SM=(0, 1, 2),
)
# Rungs of a lesson's ladder below its real kernels: tried only where they are asked for by name,
# with the tiles that the lesson lists (its RUNGS).
LOWER_RUNGS = ("direct", "flat")
KERNELS = (*LOWER_RUNGS, "pointer", "tma", "tma_ws")
# Elements of a tile in registers. A product may have 256x256: what spills there teaches something.
# Others may have 128 a thread of four warps: beyond that they spill, after minutes of compiling.
MOST_OF_A_PRODUCT, MOST_OF_ROWS = 2**16, 2**14
SHARED = 227 * 1024  # bytes that a program can have on the GPUs with TMA


class TileOp(NamedTuple):
    """A kernel whose tile is swept."""

    name: str  # what `choose_tile` is asked for
    axes: dict[str, tuple[int, ...]]  # the values that a sweep tries on each axis of the tile
    # Makes the tiles by TMA worth trying, of the sizes and an element's bytes. Without it only the
    # lesson's own are tried.
    fast: Callable[[dict, int], Iterator[dict]] | None = None
    # What its launches by TMA compute (boxes.py), if they load boxes of pixels.
    boxes: Callable[[dict], tuple[int, int, int, int]] | None = None
    pooled: bool = False  # the kernel through pointers adds up four outputs for each that it stores
    few_columns: dict[str, tuple[int, ...]] = {}  # axes that differ where there are 64 columns
    # Of a product through pointers, for A and for B: the block that lies along a stride. If that is
    # 1, so many elements are contiguous.
    strides: tuple[dict[str, str], ...] = ()


def fast_products(sizes: dict[str, int], itemsize: int) -> Iterator[dict]:
    """Tiles of the kernels of products that load by TMA: those combinations that can make sense.

    A step is 128 or 256 bytes of a row. The kernel for elements of one byte does not split K.
    """
    shapes = ((128, 256), (256, 128), (128, 128), (64, 256), (64, 128))
    for (m, n), step, stages in itertools.product(shapes, (128, 256), (3, 4)):
        few = -(-sizes["M"] // m) * -(-sizes["N"] // n)
        blocks = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=step // itemsize, GROUP_M=8)
        if m > 64 and itemsize == 2 and few > 64:  # enough work that issuing loads is what counts
            yield dict(kernel="tma_ws") | blocks | dict(
                SUBTILES=1, SPLIT_K=1, PROGRAMS_PER_SM=1, num_warps=4, num_stages=stages,
            )  # fmt: skip
        splits = [s for s in FAST_AXES["SPLIT_K"] if s == 1 or (few * s <= 264 and itemsize > 1)]
        splits = [s for s in splits if s == 1 or s * 4 * step <= sizes["K"] * itemsize]
        for subtiles, split in itertools.product((1, 2), splits):
            parts = dict(SPLIT_K=split) if itemsize > 1 else {}
            for per_sm in (0, 1, 2) if split == 1 else (1, 2):
                large, plain = m * n > 128 * 128, per_sm == 0 and (subtiles, stages) != (1, 3)
                stored = m * n // subtiles * (4 if split > 1 else itemsize)
                no_room = (m + n) * step * stages + stored > SHARED
                if plain or (per_sm == 2 and large) or no_room:
                    continue
                yield dict(kernel="tma") | blocks | dict(
                    SUBTILES=subtiles, **parts, PROGRAMS_PER_SM=per_sm,
                    num_warps=8 if m > 64 else 4, num_stages=stages,
                )  # fmt: skip


def fast_convolutions(
    sizes: dict[str, int],
    itemsize: int,
    filters: Sequence[int] = (64, 128, 256),
    split: bool = True,
) -> Iterator[dict]:
    """Tiles of a convolution that loads boxes of pixels by TMA: M pixels, N and K channels.

    A step is 128 bytes of a pixel, or less where that pads less. A tile has one of `filters`, and
    its sum may be in parts if `split`.
    """
    steps, least = [], None
    for step in (128 // itemsize, 32, 16):
        covered = -(-sizes["K"] // step) * step
        if (least is None or covered < least) and step * itemsize <= 128:
            steps, least = [*steps, step], covered
    shapes = [(m, n) for m in (256, 128) for n in filters if n == 64 or n < 2 * sizes["N"]]
    for (m, n), k, warps, stages in itertools.product(shapes, steps, (4, 8), range(2, 7)):
        if not 64 <= m * n // (32 * warps) <= 128:  # registers of a thread for the accumulator
            continue
        few = -(-sizes["M"] // m) * -(-sizes["N"] // n)
        for parts in FAST_AXES["SPLIT_K"] if split and m * n <= 128 * 128 else (1,):
            stored = m * n * (4 if parts > 1 else itemsize)
            shared = (m + n) * k * itemsize * stages + stored
            if shared > SHARED or (parts > 1 and few * parts > 264):
                continue
            for per_sm in (1, 2) if 2 * shared <= SHARED else (1,):
                yield dict(
                    kernel="tma", BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLIT_K=parts,
                    PROGRAMS_PER_SM=per_sm, num_warps=warps, num_stages=stages,
                )  # fmt: skip


def fast_weight_gradients(sizes: dict[str, int], itemsize: int) -> Iterator[dict]:
    """Tiles of a weight gradient that sums images by TMA: M filters, N taps and channels, K pixels.

    The kernel is for elements of two bytes.
    """
    shapes = ((128, 256), (128, 128), (64, 256), (64, 128), (128, 64), (64, 64))
    # A tile of 256 columns may have two pixels of half as many filters.
    shapes = [(m, n) for m, n in shapes if m == 64 or m < (2 + n // 256) * sizes["M"]]
    for (m, n), k, stages in itertools.product(shapes, (64, 32), range(2, 8)):
        subtiles = {256: 4, 128: 2, 64: 1}[n]
        stored = m * n // subtiles * 4
        shared = (m + n) * k * itemsize * stages + stored
        if itemsize != 2 or shared > SHARED or (m + n) * k * itemsize * stages < SHARED // 4:
            continue
        tiles = -(-sizes["M"] // m) * -(-sizes["N"] // n)
        for parts in FAST_AXES["SPLIT_K"]:
            # Too few programs, or parts too short to be worth adding up.
            if parts > 1 and (tiles * parts > 1024 or parts * 8 * k > sizes["K"]):
                continue
            for per_sm in (1, 2) if 2 * shared <= SHARED and m * n <= 128 * 128 else (1,):
                yield dict(
                    kernel="tma", BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLIT_K=parts,
                    SUBTILES=subtiles, PROGRAMS_PER_SM=per_sm, num_warps=m // 16,
                    num_stages=stages,
                )  # fmt: skip


def tiles(
    tile_op: TileOp,
    sizes: dict[str, int],
    given: list[dict],
    narrowed: dict[str, tuple],
    kernels: Sequence[str] = ("pointer",),
    itemsize: int = 2,
) -> list[dict]:
    """The tiles to try for one problem: `given` first (the default, the lesson's own), each once.

    Args:
        tile_op: whose tiles.
        sizes: the extent of each blocked dimension. A block never exceeds the power of two that
            covers its dimension (as in `choose_tile`): what differs only beyond that is one tile.
        given: tiles to start with.
        narrowed: the values that `-a` leaves to an axis. Given tiles that have others are dropped,
            and those of LOWER_RUNGS unless their kernel is among them.
        kernels: of the operator, those that can do it: with none, only `given` is tried.
        itemsize: bytes of an operand's element.
    """
    axes = tile_op.axes | (tile_op.few_columns if sizes.get("N", 65) <= 64 else {})
    axes = axes | {name: values for name, values in narrowed.items() if name in axes}
    product = (dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values()))
    if not kernels:
        product = ()
    if "tma" in kernels and tile_op.fast:
        fast = (t for t in tile_op.fast(sizes, itemsize) if t["kernel"] in kernels)
        product = itertools.chain(fast, product)
    most = MOST_OF_A_PRODUCT if "BLOCK_K" in axes else MOST_OF_ROWS
    narrowed = {"kernel": [k for k in KERNELS if k not in LOWER_RUNGS]} | narrowed
    chosen: dict[tuple, dict] = {}
    for tile in itertools.chain(given, product):
        full = {"kernel": "pointer"} | tile
        if any(name in full and full[name] not in values for name, values in narrowed.items()):
            continue
        tile = dict(tile)
        for name, size in sizes.items() if "kernel" not in tile else ():
            block = f"BLOCK_{name}"
            if block in tile and block not in narrowed:
                tile[block] = min(tile[block], max(16, 1 << (size - 1).bit_length()))
        if tile.get("BLOCK_M", 1) * tile.get("BLOCK_N", 1) <= most:
            chosen.setdefault(tuple(sorted(tile.items())), tile)
    return list(chosen.values())

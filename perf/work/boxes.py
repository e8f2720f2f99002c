"""How much a convolution by TMA computes: always whole boxes of pixels, as it loads them.

The launch's arguments contain all of that: packed channels, block-diagonal groups, the border of
the last boxes. They also say what a weight gradient leaves out: taps in the padding.

Each function gets a launch's arguments by name. It returns how many tiles there are, the steps of
all of them, the parts of a sum, and the rows of a tile.
"""

import math

from tilelab.kernels._tiles import cdiv
from tilelab.kernels.conv2d_weight_grad_tma import pixels_inside


def _boxes(given: dict, extents: str, tiles: str) -> tuple[int, int]:
    """How many boxes cover the pixels, and the pixels of one."""
    sizes = [given[f"TILE_{x}"] for x in tiles.split()]
    return (
        math.prod(cdiv(given[x], n) for x, n in zip(extents.split(), sizes, strict=True)),
        math.prod(sizes),
    )


def forward(given: dict) -> tuple[int, int, int, int]:
    """Boxes of output pixels, and blocks of filters."""
    boxes, pixels = _boxes(given, "N P Q", "N P Q")
    tiles = boxes * cdiv(given["K"], given["BLOCK_N"])
    steps = given["R"] * given["S"] * cdiv(given["SPAN"], given["BLOCK_K"])
    return tiles, tiles * steps, given["SPLIT_K"], pixels


def input_grad(given: dict) -> tuple[int, int, int, int]:
    """Of the classes of pixels each has taps of its own, and all together have each tap once."""
    boxes, pixels = _boxes(given, "N ROWS COLUMNS", "N H W")
    tiles = boxes * cdiv(given["C"], given["BLOCK_N"])
    steps = given["R"] * given["S"] * cdiv(given["K"], given["BLOCK_K"])
    classes = given["STRIDE_H"] * given["STRIDE_W"]
    return tiles * classes, tiles * steps, given["SPLIT_K"], pixels


def weight_grad(given: dict) -> tuple[int, int, int, int]:
    """A step is BLOCK_K images at one pixel, of those where the tap is inside."""
    rows, taps_w = given["ROWS"], given["S"]
    blocks = cdiv(given["K"], given["BLOCK_M"])
    blocks *= cdiv(given["SPAN"], given["BOX_C"])
    if given["WINDOWS"]:  # a tile has several rows of taps, and all their pixels are inside
        rows = cdiv(rows, given["BLOCK_N"] // given["BOX_C"])
        pixels = rows * given["P"] * given["Q"]
    else:
        high, wide = (
            sum(
                pixels_inside(
                    tap * given[f"DIL_{x}"] - given[f"PAD_{x}"], given[x], given[outputs],
                    given[f"STRIDE_{x}"],
                )
                for tap in range(taps)
            )
            for x, outputs, taps in (("H", "P", rows // taps_w), ("W", "Q", taps_w))
        )  # fmt: skip
        pixels = high * wide
    steps = blocks * pixels * cdiv(given["N"], given["BLOCK_K"])
    return rows * blocks, steps, given["parts"], given["BLOCK_M"]

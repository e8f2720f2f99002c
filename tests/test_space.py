"""Which tiles a sweep tries."""

import pytest

from perf import space
from perf.errors import PerfError

GIVEN = [dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=3)]
LARGE = dict(M=4096, N=4096, K=4096)


def test_given_tiles_come_first_and_each_tile_once():
    tiles = space.tiles("matmul", LARGE, GIVEN, {})
    assert tiles[0] == GIVEN[0]
    assert len({tuple(sorted(t.items())) for t in tiles}) == len(tiles) == 3 * 3 * 3 * 2 * 3 - 0
    assert all(t.keys() == GIVEN[0].keys() for t in tiles)


def test_no_block_is_larger_than_what_covers_its_dimension():
    tiles = space.tiles("matmul", dict(M=100, N=10, K=4096), GIVEN, {})
    assert max(t["BLOCK_M"] for t in tiles) == 128
    assert {t["BLOCK_N"] for t in tiles} == {16}
    assert len(tiles) < 80  # what differs only beyond the problem is one tile


def test_narrowed_axes():
    axes = space.parse_axes(["BLOCK_M=64,256", "num_warps=4"])
    assert axes == {"BLOCK_M": (64, 256), "num_warps": (4,)}
    tiles = space.tiles("matmul", LARGE, GIVEN, axes)
    assert {t["BLOCK_M"] for t in tiles} == {64, 256} and {t["num_warps"] for t in tiles} == {4}
    assert space.tiles("sgd", dict(M=100), [], axes)  # an axis that an operator lacks is no matter


def test_eight_bit_tiles_do_not_split_k():
    tiles = space.tiles("scaled_matmul", dict(M=64, N=64, K=65536), [], {}, ("pointer", "tma"), 1)
    fast = [t for t in tiles if t.get("kernel") == "tma"]
    assert {t["BLOCK_K"] for t in fast} == {128, 256} and 20 < len(fast) < len(tiles)
    assert not any("SPLIT_K" in t for t in tiles)


@pytest.mark.parametrize(
    "text, message",
    [
        ("BLOCK_M", "given as BLOCK_M=64,128; got 'BLOCK_M'"),
        ("BLOCK_M=big", "given as BLOCK_M=64,128; got 'BLOCK_M=big'"),
        ("BLOCK_M=48", "BLOCK_M takes powers of two"),
        ("num_stages=0", "num_stages takes positive numbers"),
        ("BLOCK_Q=64", "unknown axis 'BLOCK_Q': there are BLOCK_K, BLOCK_M"),
    ],
)
def test_wrong_axes(text, message):
    with pytest.raises(PerfError, match=message):
        space.parse_axes([text])
    with pytest.raises(PerfError, match="num_warps is given twice"):
        space.parse_axes(["num_warps=4", "num_warps=8"])


@pytest.mark.parametrize("tile_op", space.AXES)
def test_no_space_is_empty_or_larger_than_an_hour(tile_op):
    sizes = LARGE if "BLOCK_K" in space.AXES[tile_op] else dict(M=4096, N=4096)
    assert 10 <= len(space.tiles(tile_op, sizes, [], {})) <= 200

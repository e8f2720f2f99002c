"""Which tiles a sweep tries."""

import pytest

from tilelab.perf.commands.arguments import parse_axes
from tilelab.perf.errors import PerfError
from tilelab.perf.work import operators, search_space

TILE_OPS = {
    tile_op.name: tile_op
    for row in operators.OPERATORS.values()
    for mode in row.modes.values()
    for tile_op in mode.tile_ops
}
GIVEN = [dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=3)]
LARGE = dict(M=4096, N=4096, K=4096)


def test_given_tiles_come_first_and_each_tile_once():
    tiles = search_space.tiles(operators.MATMUL, LARGE, GIVEN, {})
    assert tiles[0] == GIVEN[0]
    assert len({tuple(sorted(t.items())) for t in tiles}) == len(tiles) == 3 * 3 * 3 * 2 * 3 - 0
    assert all(t.keys() == GIVEN[0].keys() for t in tiles)


def test_no_block_is_larger_than_what_covers_its_dimension():
    tiles = search_space.tiles(operators.MATMUL, dict(M=100, N=10, K=4096), GIVEN, {})
    assert max(t["BLOCK_M"] for t in tiles) == 128
    assert {t["BLOCK_N"] for t in tiles} == {16}
    assert len(tiles) < 80  # what differs only beyond the problem is one tile


def test_narrowed_axes():
    axes = parse_axes(["BLOCK_M=64,256", "num_warps=4"])
    assert axes == {"BLOCK_M": (64, 256), "num_warps": (4,)}
    tiles = search_space.tiles(operators.MATMUL, LARGE, GIVEN, axes)
    assert {t["BLOCK_M"] for t in tiles} == {64, 256} and {t["num_warps"] for t in tiles} == {4}
    assert search_space.tiles(
        TILE_OPS["sgd"], dict(M=100), [], axes
    )  # an axis that an operator lacks is no matter


def test_eight_bit_tiles_do_not_split_k():
    tiles = search_space.tiles(
        operators.SCALED_MATMUL, dict(M=64, N=64, K=65536), [], {}, ("pointer", "tma"), 1
    )
    fast = [t for t in tiles if t.get("kernel") == "tma"]
    assert {t["BLOCK_K"] for t in fast} == {128, 256} and 20 < len(fast) < len(tiles)
    assert not any("SPLIT_K" in t for t in tiles)


FAST = dict(
    kernel="tma", BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, SPLIT_K=1, PROGRAMS_PER_SM=1, num_warps=8,
    num_stages=3,
)  # fmt: skip
LAYER = dict(M=50176, N=256, K=256)  # pixels, channels out, channels in


def convolutions(sizes=LAYER, itemsize=2, **options):
    return list(search_space.fast_convolutions(sizes, itemsize, **options))


def test_tiles_of_convolutions_fit_registers_and_shared_memory():
    tiles = convolutions()
    assert FAST in tiles and 10 < len(tiles) < 60
    assert {t["BLOCK_M"] for t in tiles} == {128, 256}
    assert {t["BLOCK_N"] for t in tiles} == {64, 128, 256} and {t["BLOCK_K"] for t in tiles} == {64}
    for t in tiles:
        result = t["BLOCK_M"] * t["BLOCK_N"]
        assert result <= 128 * 32 * t["num_warps"]
        step = (t["BLOCK_M"] + t["BLOCK_N"]) * t["BLOCK_K"]
        assert 2 * (step * t["num_stages"] + result) <= 227 * 1024
    assert {t["BLOCK_N"] for t in convolutions(LAYER | dict(N=64))} == {64}


@pytest.mark.parametrize(
    "channels, itemsize, steps",
    [(256, 2, {64}), (96, 2, {64, 32}), (48, 2, {64, 16}), (32, 2, {64, 32}), (4, 2, {64, 32, 16}),
     (48, 4, {32, 16}), (256, 4, {32})],
)  # fmt: skip
def test_a_shorter_step_is_tried_where_it_pads_less(channels, itemsize, steps):
    tiles = convolutions(LAYER | dict(K=channels), itemsize)
    assert {t["BLOCK_K"] for t in tiles} == steps


def test_a_sum_is_in_parts_where_there_are_few_tiles():
    """And a second program an SM where both have room."""
    few = LAYER | dict(M=32 * 7 * 7)
    assert {t["SPLIT_K"] for t in convolutions(few)} >= {1, 2, 4}
    assert {t["SPLIT_K"] for t in convolutions(LAYER | dict(M=2**20))} == {1}
    assert {t["SPLIT_K"] for t in convolutions(few, split=False)} == {1}
    assert {t["PROGRAMS_PER_SM"] for t in convolutions()} == {1, 2}
    for op in (operators.CONV, operators.CONV_FLAT, operators.CONV_GROUPED):
        tiles = search_space.tiles(op, few, [FAST], {}, ("pointer", "tma"))
        assert len(tiles) == len({tuple(sorted(t.items())) for t in tiles})
        fast = [t for t in tiles if "kernel" in t][1:]
        assert ({t["BLOCK_N"] for t in fast} == {64}) == (op is operators.CONV_GROUPED)


def test_tiles_of_weight_gradients_have_room_and_whole_warpgroups():
    sizes = dict(K=32 * 28 * 28, M=128, N=9 * 128)
    tiles = list(search_space.fast_weight_gradients(sizes, 2))
    assert {t["BLOCK_K"] for t in tiles} == {32, 64}  # images of a step
    for t in tiles:
        m, n = t["BLOCK_M"], t["BLOCK_N"]
        shared = (m + n) * t["BLOCK_K"] * 2 * t["num_stages"] + 4 * m * n // t["SUBTILES"]
        assert shared * t["PROGRAMS_PER_SM"] <= 227 * 1024
        assert m * n // (32 * t["num_warps"]) <= 128  # registers of a thread
        assert t["SPLIT_K"] == 1 or t["SPLIT_K"] * 8 * t["BLOCK_K"] <= sizes["K"]
    assert {t["SPLIT_K"] for t in tiles} >= {1, 8, 32}
    few = list(search_space.fast_weight_gradients(sizes | dict(M=64), 2))
    assert {t["BLOCK_N"] for t in few if t["BLOCK_M"] == 128} == {256}  # of two pixels
    assert {t["BLOCK_M"] for t in search_space.fast_weight_gradients(sizes | dict(M=32), 2)} == {64}
    assert not list(search_space.fast_weight_gradients(sizes, 4))  # float32 has no such kernel
    every = search_space.tiles(operators.CONV_WGRAD, sizes, [], {}, ("pointer", "tma"))
    assert [t for t in every if "kernel" in t] == tiles


def test_only_the_lessons_tiles_of_fast_kernels_that_nobody_has_a_space_for():
    tiles = search_space.tiles(operators.FUSED, LAYER, [FAST], {}, ("pointer", "tma"))
    assert [t for t in tiles if "kernel" in t] == [FAST]


def test_lower_rungs_are_tried_where_they_are_asked_for():
    """With the tiles that the lesson lists; the others are narrowed as ever."""
    rungs = [dict(kernel="direct", BLOCK_M=64, num_warps=4), FAST | dict(kernel="flat")]
    every = ("direct", "flat", "pointer", "tma")
    plain = search_space.tiles(operators.CONV, LAYER, [FAST, *rungs], {}, every)
    assert {t.get("kernel") for t in plain} == {None, "tma"}
    axes = parse_axes(["kernel=direct,flat,tma"])
    tiles = search_space.tiles(operators.CONV, LAYER, [FAST, *rungs], axes, every)
    assert tiles[:3] == [FAST, *rungs]
    assert {t["kernel"] for t in tiles[3:]} == {"tma"}


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
        parse_axes([text])
    with pytest.raises(PerfError, match="num_warps is given twice"):
        parse_axes(["num_warps=4", "num_warps=8"])


@pytest.mark.parametrize("tile_op", TILE_OPS.values(), ids=TILE_OPS)
def test_no_space_is_empty_or_larger_than_an_hour(tile_op):
    sizes = LARGE if "BLOCK_K" in tile_op.axes else dict(M=4096, N=4096)
    assert 10 <= len(search_space.tiles(tile_op, sizes, [], {})) <= 200

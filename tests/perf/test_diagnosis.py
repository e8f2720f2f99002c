"""Why a tile lost: each cause is found from its numbers, in the order of the cascade, and no other.

The rows here differ from the winner's in one thing each; those of perf_rows.py in many.
"""

import re

import pytest

from tests.tools import perf_rows
from tilelab.perf.report import diagnosis
from tilelab.perf.rows.ranking import workloads
from tilelab.perf.work import gpus

H200 = gpus.GPUS["h200"]
TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
OTHER = TILE | dict(num_stages=4)


def row(**more):
    """The winner of a 4096³ matmul: 100 µs predicted, 120 µs measured."""
    return (
        dict(
            kind="row", gpu="NVIDIA H200", measured=True, op="matmul", mode="fwd",
            dtype="bfloat16", precision="ieee", shape=dict(M=4096, N=4096, K=4096),
            shape_name="4096³", impl="tilelab", tile=TILE, stage="final", status="ok",
            flops=2 * 4096**3, bytes=3 * 2 * 4096**2, moved=3 * 2 * 4096**2, launches=0,
            registers=200, spills=0, shared=147456, occupancy=0.125, limit="registers",
            waves=3.88, wave_efficiency=0.97, padding=1.0, tensor_core="HGMMA.64x256x16.F32.BF16",
            serialised=False, operands="shared", load_bytes=16, loop_instructions=92, tma=False,
            predicted_s=100e-6, bound="compute", median_s=120e-6, low_s=119e-6, high_s=121e-6,
        )
        | more
    )  # fmt: skip


BEST = row()


def loser(**more):
    """A tile that takes 1.5 times as long, for no reason unless one is given."""
    return row(**dict(tile=OTHER, median_s=180e-6, predicted_s=100e-6) | more)


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_the_bytes_for_a_thousand_flops_are_those_of_the_dtype(dtype, size):
    bytes_a_step, flops = size * (128 + 256) * 64, 2 * 128 * 256 * 64
    tile = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)
    assert diagnosis._operand_bytes(row(tile=tile, dtype=dtype)) == 1000 * bytes_a_step / flops


@pytest.mark.parametrize(
    "code, numbers, changes",
    [
        ("wrong", ["0.41", "0.0043"], dict(status="wrong", error=0.41, tolerance=0.0043)),
        ("error", ["fails when it runs", "bad"], dict(status="error", reason="bad\n  address")),
        ("error", ["not compile", "x"], dict(status="error", stage="compile", reason="x")),
        ("does not fit", ["242 KiB"], dict(
            status="pruned", limit="does not fit: shared memory", shared=242 * 1024)),
        ("does not fit", ["300 x 256 threads"], dict(
            status="pruned", limit="does not fit: registers", registers=300, threads=256)),
        ("does not fit", ["out of resource"], dict(
            status="error", reason="OutOfResources: out of resource: shared memory")),
        ("spills", ["128 bytes", "accumulators alone take 128 of 255 registers"], dict(spills=128)),
        ("no tensor cores", ["HGMMA.64x256x16"], dict(tensor_core=None)),
        ("older tensor cores", ["HMMA.16816"], dict(tensor_core="HMMA.16816.F32.BF16")),
        ("serialised", ["wgmma"], dict(serialised=True)),
        ("narrow loads", ["2 bytes wide", "16"], dict(load_bytes=2)),
        ("occupancy", ["6%", "limited by shared memory", "200 KiB", "12%"], dict(
            occupancy=0.0625, limit="shared memory", shared=204800)),
        ("waves", ["1.03 waves", "48%", "3%"], dict(
            waves=1.03, wave_efficiency=0.515, predicted_s=150e-6)),
        ("padding", ["25%", "0%"], dict(padding=4 / 3, predicted_s=133e-6)),
        ("loop", ["2.00x the instructions"], dict(loop_instructions=184)),
        ("traffic", ["23.4 bytes", "11.7"], dict(tile=TILE | dict(BLOCK_M=64, BLOCK_N=128),
                                                 loop_instructions=23)),
        ("tie", ["120 µs"], dict(median_s=120.5e-6)),
        ("skipped", ["budget"], dict(status="skipped", reason="time budget", median_s=None)),
        ("pruned", ["predicted 3x"], dict(status="pruned", reason="predicted 3x", median_s=None)),
        ("unexplained", ["predicted: 1.00x", "num_stages 4 instead of 3"], {}),
    ],
)  # fmt: skip
def test_every_cause_is_found_with_its_numbers(code, numbers, changes):
    found, words = diagnosis.explain_loss(loser(**changes), BEST, H200)
    assert found == code, words
    for number in numbers:
        assert number in words
    assert found in diagnosis.TITLES


def test_the_winner_is_the_winner_and_lost_nothing():
    assert diagnosis.explain_loss(BEST, BEST, H200)[0] == "best"


def test_a_cause_that_the_winner_shares_is_none():
    bad = dict(
        spills=64, tensor_core=None, serialised=True, load_bytes=4, occupancy=0.06,
        wave_efficiency=0.5, waves=0.5, padding=1.5, loop_instructions=400,
    )  # fmt: skip
    assert diagnosis.explain_loss(loser(**bad), row(**bad), H200)[0] == "unexplained"


def test_the_cascade_has_an_order():
    """The first of several causes is named, as each is left out in turn."""
    causes = [
        ("wrong", dict(status="wrong", error=1.0)),
        ("spills", dict(spills=16)),
        ("no tensor cores", dict(tensor_core=None)),
        ("serialised", dict(serialised=True)),
        ("narrow loads", dict(load_bytes=4)),
        ("occupancy", dict(occupancy=0.06)),
        ("loop", dict(loop_instructions=300)),
    ]
    for i, (code, _) in enumerate(causes):
        changes = {k: v for _, change in causes[i:] for k, v in change.items()}
        assert diagnosis.explain_loss(loser(**changes), BEST, H200)[0] == code


def test_a_modelled_cause_says_how_much_of_the_gap_it_explains():
    # Half the wave efficiency: predicted to take twice as long, and it takes eight times as long.
    slow = loser(wave_efficiency=0.485, waves=0.97, predicted_s=200e-6, median_s=960e-6)
    code, words = diagnosis.explain_loss(slow, BEST, H200)
    assert code == "waves" and "by the model 2.00x: 33% of the gap" in words


def test_a_faster_computation_ends_at_the_memory_floor():
    # The memory alone takes 90 of its 120 µs: without padding it would be 90, not 60.
    slow = loser(padding=2.0, predicted_s=120e-6, moved=int(90e-6 * H200.bandwidth))
    assert "1.33x: 71% of" in diagnosis.explain_loss(slow, BEST, H200)[1]
    assert (
        "2.00x: more than the gap" in diagnosis.explain_loss(slow, BEST, None)[1]
    )  # an unknown GPU has no floor


def test_waves_do_not_matter_to_a_tile_that_waits_for_memory():
    slow = loser(wave_efficiency=0.5, waves=0.5, bound="memory")
    assert diagnosis.explain_loss(slow, BEST, H200)[0] == "unexplained"


def test_what_explains_more_than_half_goes_before_a_suspicion():
    both = dict(occupancy=0.06, padding=1.45, predicted_s=145e-6)
    code, words = diagnosis.explain_loss(loser(**both), BEST, H200)
    assert code == "padding" and "also occupancy 6%" in words
    both = dict(occupancy=0.06, padding=1.05, predicted_s=105e-6)
    code, words = diagnosis.explain_loss(loser(**both), BEST, H200)
    assert code == "occupancy" and "also 5% of its work is padding" in words


def test_a_pruned_tile_says_that_it_was_not_timed():
    code, words = diagnosis.explain_loss(
        loser(status="pruned", spills=64, median_s=None, predicted_s=None, reason="spills"), BEST
    )
    assert code == "spills" and words.endswith("(pruned, not timed)")


def test_predicted_rows_are_compared_by_prediction_and_say_so():
    offline = dict(status="predicted", stage="compile", median_s=None)
    code, words = diagnosis.explain_loss(
        loser(**offline | dict(padding=1.5, predicted_s=150e-6)), row(**offline), H200
    )
    assert code == "padding" and "by the model 1.50x: all of the gap" in words


def test_memory_bound_operators():
    def rows(**more):
        return row(
            **dict(op="softmax", tile=dict(BLOCK_M=4, BLOCK_N=1024, num_warps=8), bound="memory",
                   tensor_core=None, loop_instructions=None) | more
        )  # fmt: skip

    code, words = diagnosis.explain_loss(
        rows(moved=2 * BEST["moved"], median_s=240e-6), rows(), H200
    )
    assert code == "traffic" and "0.201 GB, the winner 0.101 GB" in words


def test_rows_with_next_to_nothing_in_them():
    bare = dict(op="matmul", mode="fwd", dtype="float32", shape={}, impl="tilelab", tile={},
                stage="screen", status="ok", flops=1, bytes=1, median_s=2.0)  # fmt: skip
    assert diagnosis.explain_loss(bare, dict(bare, median_s=1.0), H200)[0] == "unexplained"
    assert diagnosis.explain_loss(bare, None, None)[0] == "unexplained"
    for status in ("wrong", "error", "pruned", "skipped"):
        code, words = diagnosis.explain_loss(dict(bare, status=status, median_s=None), None)
        assert code == status and words


# -- tables --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return perf_rows.rows(count=40)


def test_every_tile_of_every_workload_is_in_the_table(rows):
    tables = diagnosis.table(rows)
    assert len(tables) == len(perf_rows.problems())
    for table in tables:
        assert len(table.verdicts) == len(table.workload.tiles) > 15
        assert [v.code for v in table.verdicts].count("best") == 1
        gaps = [v.gap for v in table.verdicts if v.gap is not None]
        assert gaps == sorted(gaps) and table.verdicts[0].gap == 1
    codes = {v.code for table in tables for v in table.verdicts}
    assert {"wrong", "error", "skipped", "spills", "tie"} <= codes
    assert {"waves", "occupancy", "traffic"} & codes
    explained = [v for table in tables for v in table.verdicts if v.code == "unexplained"]
    assert len(explained) < 0.25 * sum(len(table.verdicts) for table in tables)


def test_the_text_groups_and_cuts(rows):
    text = diagnosis.format_table(diagnosis.table(rows)[:1], tiles=2)
    title, best, default, *groups = text.splitlines()
    assert default.startswith("  the default tile: 128x128x32 w8 s3 g8, ")
    assert re.search(r", \d\.\d\dx the winner's time: [a-z]", default)
    assert text.count(" (default)") <= 1
    assert title == f"matmul fwd, bfloat16, square 512, on {perf_rows.GPU}"
    assert re.fullmatch(r"  best of \d+ tiles: \d+x\d+x\d+ w\d s\d g8, [\d.,]+ TFLOP/s", best)
    heads = [re.match(r"  (\d+) tiles?: ", line) for line in groups]
    counts = [int(head[1]) for head in heads if head]
    assert len(counts) > 3 and counts == sorted(counts, reverse=True)
    ties = sum(int(line.split()[0]) for line in groups if ": as fast as the winner: " in line)
    shown = sum(line.startswith("    ") and "and" != line.split()[0] for line in groups)
    hidden = sum(int(line.split()[1]) for line in groups if line.startswith("      and "))
    assert shown <= 2 * len(counts) and shown + hidden == sum(counts) - ties
    assert max(map(len, text.splitlines())) < 200


def test_ties_are_named_without_reasons_and_the_default_is_marked():
    rows = [row(default=False)]
    rows += [row(tile=OTHER | dict(GROUP_M=g), median_s=120.5e-6, default=g == 4) for g in range(9)]
    text = diagnosis.format_table(diagnosis.table(rows), tiles=2)
    assert text.splitlines()[1:] == [
        "  best of 10 tiles: 128x256x64 w8 s3 g8, 1,145 TFLOP/s",
        "  the default tile: 128x256x64 w8 s4 g4, 1.00x the winner's time: as fast as the winner",
        "  9 tiles: as fast as the winner: 128x256x64 w8 s4 g0, 128x256x64 w8 s4 g1 and 7 more",
    ]
    best = diagnosis.format_table(diagnosis.table([row(default=True)]))
    assert best.endswith("best of 1 tile: 128x256x64 w8 s3 g8 (default), 1,145 TFLOP/s")
    assert "w8 s4 g4 (default)" in diagnosis.leaderboard_text(rows, most=9)
    lost = diagnosis.format_table(diagnosis.table([row(), loser(default=True, spills=64)]))
    assert "1.50x the winner's time: registers spilled to memory" in lost


def test_what_nobody_can_explain_is_said_once():
    rows = [row(), *(loser(tile=OTHER | dict(GROUP_M=g)) for g in range(3))]
    text = diagnosis.format_table(diagnosis.table(rows))
    assert text.count("do not say why") == 0 and text.count("no reason that these numbers") == 1
    assert text.count("predicted: 1.00x the winner's time; it has ") == 3


def test_a_workload_without_a_time_has_a_table():
    tables = diagnosis.table([row(status="error", reason="x", median_s=None, predicted_s=None)])
    assert "none of 1 tile has a time" in diagnosis.format_table(tables)
    assert "1 tile: failed" in diagnosis.format_table(tables)


def test_leaderboard(rows):
    text = diagnosis.leaderboard_text(rows, most=3)
    boards = text.split("\n\n")
    assert len(boards) == len(perf_rows.problems())
    assert boards[0].count("tilelab") == 3 and boards[0].count("1.00x\n") >= 1
    assert "PyTorch " in boards[0] and "torch.compile " in boards[0]
    assert re.search(r"and \d+ tiles? more$", boards[0])
    speeds = [float(n.replace(",", "")) for n in re.findall(r"([\d.,]+) TFLOP/s", boards[0])]
    assert len(speeds) == 5 and speeds == sorted(speeds, reverse=True)
    assert "GB/s" in boards[-1]


def test_leaderboard_ratios_are_of_the_rounds_and_above_1_where_a_peer_is_faster():
    samples = [1e-4 * (1 + 0.1 * (i % 5)) for i in range(20)]  # rounds differ by up to 40%
    ours = row(samples_s=samples, median_s=1.2e-4, race="1")
    peer = row(impl="torch", tile=None, samples_s=[s / 1.25 for s in samples],
               median_s=0.96e-4, race="1")  # fmt: skip
    assert "1.25x [1.250, 1.250]" in diagnosis.leaderboard_text([ours, peer])
    alone = diagnosis.leaderboard_text([ours, peer | dict(race="2")])
    assert "1.25x" in alone and "[1.25" not in alone


def test_leaderboard_says_what_is_missing_or_predicted():
    failed = row(impl="compile", tile=None, status="error", reason="no ptxas", median_s=None,
                 predicted_s=None)  # fmt: skip
    assert "torch.compile: no ptxas" in diagnosis.leaderboard_text([row(), failed])
    offline = row(status="predicted", stage="compile", median_s=None, measured=False)
    assert "(predicted, not measured)" in diagnosis.leaderboard_text([offline])
    assert "nothing has a time (1 tile tried)" in diagnosis.leaderboard_text([row(status="wrong")])


def test_workloads_join_the_stages_of_a_tile():
    stages = [
        row(stage="compile", status="predicted", median_s=None, registers=200),
        row(stage="screen", registers=None, median_s=130e-6),
        row(stage="final", registers=None, median_s=120e-6),
        row(stage="screen", tile=OTHER, median_s=110e-6),
    ]
    (workload,) = workloads(stages)
    assert len(workload.tiles) == 2
    assert workload.best["registers"] == 200 and workload.best["median_s"] == 120e-6
    (reversed_,) = workloads(stages[::-1])
    assert reversed_.best == workload.best


def test_workloads_come_in_order_whichever_was_finished_first():
    names = ["net.layer10.conv1 n32", "other 1", "net.layer2.conv2 n32", "net.conv1 n32",
             "net.layer2.conv1 n32", "net.layer2.conv1 n256"]  # fmt: skip
    rows = [row(shape_name=name, shape=dict(M=i)) for i, name in enumerate(names)]
    assert [(w.family, w.label) for w in workloads(rows)] == [
        ("net n32", "conv1"), ("net n32", "layer2.conv1"), ("net n32", "layer2.conv2"),
        ("net n32", "layer10.conv1"), ("other", "1"), ("net n256", "layer2.conv1"),
    ]  # fmt: skip
    sizes = [row(shape_name="", shape=dict(M=m, N=7)) for m in (4096, 512, 1024)]
    assert [w.shape["M"] for w in workloads(sizes)] == [512, 1024, 4096]


def test_workloads_keep_apart_what_cannot_be_compared():
    different = [
        {}, dict(gpu="NVIDIA A100-SXM4-80GB"), dict(measured=False), dict(mode="dgrad"),
        dict(dtype="float16"), dict(precision="tf32"), dict(shape=dict(M=1, N=2, K=3)),
        dict(cache="hot"),
    ]  # fmt: skip
    assert len(workloads(row(**more) for more in different)) == len(different)
    assert len(workloads([row(), row(cache="cold", tile=OTHER)])) == 1

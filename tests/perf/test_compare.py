"""Comparing two results files: verdicts on made-up runs whose truth is known."""

import argparse
import contextlib
import io

import numpy as np
import pytest

from tests.tools import perf_rows
from tilelab.perf.errors import PerfError
from tilelab.perf.report import compare as module
from tilelab.perf.report.compare import compare, format_table, summary
from tilelab.perf.rows import results

HEADER = perf_rows.HEADER | {"commit": "0123456789abcdef"}


def samples(median, seed=0, spread=0.003, count=40):
    return (median * np.random.default_rng(seed).lognormal(0, spread, count)).tolist()


def row(median=1e-3, seed=0, spread=0.003, **changes):
    timed = samples(median, seed, spread)
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4}
    about = dict(tile=tile, samples_s=timed, median_s=float(np.median(timed)))
    return perf_rows.one_row(**about | changes)


def peer(median=1e-3, **changes):
    return row(median, impl="torch", tile=None, source=None, **changes)


def written(path, *rows, **header):
    with results.Writer(path, {**HEADER, **header}) as writer:
        for each in rows:
            writer.write(each)
    return str(path)


def main(*args):
    """Run the command; return its exit status and what it printed."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = module.run(parser.parse_args(list(args)))
    return status, printed.getvalue()


def one(a, b, **options):
    (found,) = compare([a], [b], **options)
    return found


@pytest.mark.parametrize(
    "factor, spread, verdict",
    [
        (1.00, 0.003, "SAME"),
        (1.01, 0.003, "SAME"),  # certainly slower, by less than the margin
        (1.10, 0.003, "SLOWER"),
        (0.90, 0.003, "FASTER"),
        (1.00, 0.1, "UNSURE"),  # the spread would hide a difference
        (1.05, 0.2, "UNSURE"),
        (1.03, 0.003, "SLOWER"),
    ],
)
def test_verdicts(factor, spread, verdict):
    found = one(row(1e-3, 1, spread), row(factor * 1e-3, 2, spread))
    assert found.verdict == verdict, found
    assert found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(factor, abs=max(0.002, 0.6 * spread))


@pytest.mark.parametrize(
    "ratio, low, high, verdict",
    [
        (1.00, 0.98, 1.02, "SAME"),  # the margin itself belongs to SAME
        (1.00, 0.979, 1.02, "UNSURE"),
        (1.00, 0.98, 1.021, "UNSURE"),
        (1.03, 1.001, 1.06, "SLOWER"),
        (1.03, 1.0, 1.06, "UNSURE"),  # not wholly above 1
        (1.015, 1.005, 1.03, "UNSURE"),  # slower for sure, but by more than the margin?
        (0.97, 0.94, 0.999, "FASTER"),
        (0.97, 0.94, 1.0, "UNSURE"),
        (0.985, 0.97, 0.995, "UNSURE"),
        (1.5, None, None, "UNSURE"),
    ],
)
def test_verdicts_at_their_limits(ratio, low, high, verdict):
    assert module._verdict(ratio, low, high, 0.02) == verdict


def test_the_margin_decides_what_is_the_same():
    a, b = row(1e-3, 1), row(1.04e-3, 2)
    assert one(a, b).verdict == "SLOWER"
    assert one(a, b, margin=0.06).verdict == "SAME"


def test_runs_are_not_paired_by_the_order_of_their_samples():
    """Sorted alike, samples of two runs would seem to agree round by round."""
    timed = sorted(samples(1e-3, spread=0.1))
    found = one(row(samples_s=timed), row(samples_s=timed))
    assert found.ratio == 1 and found.high - found.low > 0.02 and found.verdict == "UNSURE"


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(
    "change, note", [({"noisy": True}, "noisy"), ({"throttled": 3}, "throttled in 3 rounds")]
)
def test_noisy_and_throttled_rows_are_unsure(side, change, note):
    rows = {"a": row(1e-3, 1), "b": row(2e-3, 2)}
    rows[side] |= change
    found = one(rows["a"], rows["b"])
    assert found.verdict == "UNSURE" and f"{side.upper()} {note}" in found.note
    calm = one(row(1e-3, 1, noisy=False, throttled=0), row(2e-3, 2))
    assert calm.verdict == "SLOWER" and not calm.note


def test_the_power_cap_is_part_of_how_fast_a_large_product_is():
    capped = row(1e-3, 1) | {"throttled": 20, "throttle_reasons": ["power cap"]}
    found = one(capped, row(2e-3, 2))
    assert found.verdict == "SLOWER" and "power cap" in found.note
    hot = capped | {"throttle_reasons": ["power cap", "thermal (hardware)"]}
    assert one(hot, row(2e-3, 2)).verdict == "UNSURE"


def test_rows_without_samples_have_no_interval():
    found = one(row(1e-3, samples_s=None), row(2e-3))
    assert found.ratio == pytest.approx(2, rel=0.01) and found.low is None
    assert found.verdict == "UNSURE" and "no samples" in found.note


def test_the_best_tile_of_each_is_compared():
    small, large = {"BLOCK_M": 16, "num_warps": 4}, {"BLOCK_M": 128, "num_warps": 8}
    a = [row(3e-3, 1, tile=small), row(1e-3, 2, tile=large)]
    b = [row(2e-3, 3, tile=small), row(4e-3, 4, tile=large)]
    (found,) = compare(a, b)
    assert found.ratio == pytest.approx(2, rel=0.01) and found.verdict == "SLOWER"
    assert found.note == "tile in A: 128 w8"
    slower, faster = compare(a, b, every_tile=True)
    assert (slower.verdict, faster.verdict) == ("SLOWER", "FASTER")
    assert slower.a["tile"] == slower.b["tile"] == large


def test_finalists_come_before_what_was_only_screened():
    """The screening's fastest sample is luck; finals are what counts."""
    a = [row(1e-3, 1), row(0.5e-3, 2, stage="screen"), row(0.4e-3, 3, stage="screen", tile={})]
    (found,) = compare(a, [row(1e-3, 4)])
    assert found.ratio == pytest.approx(1, rel=0.01) and not found.note
    (found,) = compare(a[1:2], [row(1e-3, 4)])
    assert found.ratio == pytest.approx(2, rel=0.01) and found.note == "A only screened"


def test_only_right_results_are_compared():
    wrong = row(0.1e-3, status="wrong", reason="error 0.7", tile={"BLOCK_M": 16})
    (found,) = compare([row(1e-3, 1)], [row(1e-3, 2), wrong])
    assert found.ratio == pytest.approx(1, rel=0.01)
    for status in ("pruned", "skipped"):
        assert not compare([row()], [row(status=status)])
    assert not compare([row()], [row(stage="compile", median_s=None)])  # compiled, never timed


def test_what_has_no_right_result_any_more_is_the_worst():
    a = [row(1e-3, 1), row(1e-3, 2, mode="dgrad")]
    b = [row(9e-3, 3), row(mode="dgrad", status="wrong", reason="relative error 0.7")]
    lost, slower = compare(a, b)
    assert (lost.ratio, lost.verdict) == (None, "UNSURE")
    assert lost.note == "wrong in B: relative error 0.7"
    assert slower.verdict == "SLOWER"
    assert module.failed([lost], "slower") and not module.failed([lost], None)
    assert "1 with no right result in B" in summary([lost, slower])
    assert not compare(b[1:], a[1:])  # what is right now and was not before is news, not a ratio


def test_workloads_match_in_everything_that_matters():
    for change in (
        {"op": "conv2d"},
        {"mode": "dgrad"},
        {"dtype": "float16"},
        {"precision": "tf32"},
        {"shape": {"M": 64, "N": 32, "K": 17}},
        {"impl": "torch"},
        {"cache": "hot"},
    ):
        assert not compare([row()], [row(**change)]), change
    assert compare([row()], [row(cache="cold", shape={"K": 16, "N": 32, "M": 64})])


def test_the_worst_is_first_and_the_table_is_aligned():
    modes = {"fwd": 0.5, "dgrad": 3.0, "wgrad": 1.0}
    a = [row(1e-3, 1, mode=mode) for mode in modes]
    b = [row(factor * 1e-3, 2, mode=mode) for mode, factor in modes.items()]
    found = compare([*a, peer(1e-3)], [*b, peer(5e-3)])
    text = format_table(found).splitlines()
    assert [line.split()[0] for line in text if line.strip()] == [
        "verdict", "SLOWER", "SAME", "FASTER", "peers", "SLOWER"
    ]  # fmt: skip
    assert text[0].index("what") == text[1].index("matmul") == text[-1].index("matmul")
    assert "1 ms" in text[1] and "500 µs" in text[3]
    assert "64x32 w4" in text[1] and text[-1].endswith("PyTorch")


def test_the_summary_counts_ours_and_tells_the_drift_of_the_peers():
    modes = {"fwd": 0.5, "dgrad": 2.0, "wgrad": 1.0}
    a = [row(1e-3, 1, mode=mode) for mode in modes]
    b = [row(f * 1e-3, 1, mode=mode, source="bbbb") for mode, f in modes.items()]
    a += [peer(1e-3, mode="fwd"), peer(1e-3, mode="dgrad")]
    b += [peer(1.1e-3, mode="fwd"), peer(1e-3, mode="dgrad", noisy=True)]
    lines = summary(compare(a, b)).splitlines()
    assert lines[0] == (
        "tilelab: 1 SLOWER, 1 FASTER, 1 SAME, 0 UNSURE; geometric mean of B / A 1.000"
    )
    assert lines[1] == "kernel source: changed in 3, same in 0 of 3"
    assert lines[2] == "peers: drifted by +4.9% (geometric mean of 2, from +0.0% to +10.0%)"
    lines = summary(compare(a[:3], a[:2] + [row(2e-3, mode="wgrad")])).splitlines()
    assert lines[1].endswith("1 SLOWER with the same source: the machine or the compiler")
    assert lines[2].startswith("peers: none")


def test_unknown_sources_are_not_called_the_same():
    assert one(row(source=None), row(source=None)).source == ""
    assert one(row(), row()).source == "same"
    assert one(row(), row(source="b")).source == "changed"


@pytest.mark.parametrize(
    "factor, spread, statuses",
    [
        (1.5, 0.003, (0, 1, 1)),
        (1.0, 0.003, (0, 0, 0)),
        (1.0, 0.3, (0, 0, 1)),
        (0.5, 0.003, (0,) * 3),
    ],
)
def test_fail_on(tmp_path, factor, spread, statuses):
    a = written(tmp_path / "a", row(1e-3, 1, spread), peer(1e-3))
    b = written(tmp_path / "b", row(factor * 1e-3, 2, spread), peer(9e-3))  # peers never fail
    flags = ((), ("--fail-on", "slower"), ("--fail-on", "unsure"))
    assert tuple(main(a, b, *flag)[0] for flag in flags) == statuses


def test_the_command_says_what_was_compared(tmp_path):
    a = written(tmp_path / "a", row(1e-3, 1))
    b = written(tmp_path / "b", row(1e-3, 2), commit="fedcba987654", dirty=True, driver="580.2")
    _, text = main(a, b)
    assert f"A: {a}, NVIDIA H200, commit 0123456789ab, 2026-01-01T00:00:00Z" in text
    assert f"B: {b}, NVIDIA H200, commit fedcba987654 and changes, 2026" in text
    assert "note: besides the kernels, these differ: driver 570.1 -> 580.2" in text
    assert "1 SAME" in text and "SAME" in format_table(compare([row()], [row()]))


def test_the_margin_of_the_command_is_in_percent(tmp_path):
    a, b = written(tmp_path / "a", row(1e-3, 1)), written(tmp_path / "b", row(1.1e-3, 2))
    assert "1 SLOWER" in main(a, b)[1]
    assert "1 SAME" in main(a, b, "--margin", "15")[1]
    for wrong in ("-1", "100", "nan"):
        with pytest.raises(PerfError, match="--margin must be from 0 to 100"):
            main(a, b, f"--margin={wrong}")


def test_two_gpus_are_compared_only_anyway(tmp_path):
    a = written(tmp_path / "a", row(1e-3, 1))
    b = written(tmp_path / "b", row(2e-3, 2), gpu="NVIDIA A100")
    with pytest.raises(PerfError, match="two GPUs, NVIDIA H200 and NVIDIA A100: .*--anyway"):
        main(a, b)
    status, text = main(a, b, "--anyway")
    assert status == 0 and "note: these are two GPUs" in text and "1 SLOWER" in text


def predicted(seconds, **changes):
    return row(
        stage="compile",
        status="predicted",
        samples_s=None,
        median_s=None,
        predicted_s=seconds,
        **changes,
    )


def test_predictions_are_compared_with_predictions_and_called_so(tmp_path):
    about = {"gpu": "sm_90 (compiled)", "measured": False, "driver": None}
    a = written(tmp_path / "a", predicted(1e-3), predicted(2e-3, tile={"BLOCK_M": 16}), **about)
    b = written(tmp_path / "b", predicted(1.5e-3, source="bbbb"), **about)
    _, text = main(a, b)
    assert "note: predicted, not measured" in text and "1 SLOWER" in text and "1.500" in text
    assert "A predicted, B predicted" in text and "changed in 1" in text
    timed = written(tmp_path / "timed", row(1e-3), gpu="sm_90 (compiled)")
    with pytest.raises(PerfError, match="timed is measured, the other is predicted"):
        main(a, timed)
    status, text = main(a, timed, "--anyway", "--fail-on", "slower")
    assert status == 0 and "1 UNSURE" in text and "A predicted" in text


def test_files_that_cannot_be_compared(tmp_path):
    a = written(tmp_path / "a", row())
    b = written(tmp_path / "b", row(op="softmax", shape={"M": 1, "N": 2}))
    with pytest.raises(PerfError, match="no right result of one workload in common"):
        main(a, b)
    with pytest.raises(PerfError, match="cannot read"):
        main(a, str(tmp_path / "nothing"))
    both = tmp_path / "both"
    written(tmp_path / "c", row(), gpu="NVIDIA A100")
    both.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "c").read_bytes())
    with pytest.raises(PerfError, match="results of several kinds .NVIDIA A100, NVIDIA H200."):
        main(a, str(both))

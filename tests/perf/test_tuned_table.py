"""perf/report/tuned_table.py: a sweep's winners come back as the tiles that kernels run with."""

import importlib.metadata
import json
import multiprocessing
import os
import time

import pytest
import torch

from tilelab.kernels import _launch, _tiles
from tilelab.perf.errors import PerfError
from tilelab.perf.report import tuned_table
from tilelab.perf.rows import results

GPU = "NVIDIA H200"
DEFAULT = {2: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4)}


def row(block=128, M=4096, seconds=1e-3, **more):
    """A finalist of a matmul."""
    sizes = dict(M=M, N=4096, K=4096)
    tile = dict(BLOCK_M=block, BLOCK_N=128, BLOCK_K=64, num_warps=8)
    return dict(
        kind="row", op="matmul", mode="fwd", dtype="bfloat16", precision="ieee", shape=sizes,
        impl="tilelab", tile=tile, tile_op="matmul", sizes=sizes, stage="final", status="ok",
        source="abc", bound="compute", tflops=0.1374 / seconds, gbps=0.1 / seconds,
        median_s=seconds, cache="cold", time="2026-03-04T05:06:07Z", gpu=GPU, measured=True,
    ) | more  # fmt: skip


def entries(path):
    return json.loads(path.read_text())["tiles"]


def blocks(path):
    """BLOCK_M of each entry, in the order of the file."""
    return [entry["tile"]["BLOCK_M"] for entry in entries(path)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """choose_tile as on a tuned H200, whose tables are in a folder of the test's own."""
    real = _tiles.tuned_path
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "_name", lambda index: GPU)
    monkeypatch.setattr(_tiles, "tuned_path", lambda name, folder=None: real(name, tmp_path))
    _tiles.forget_tuned()
    yield tmp_path
    _tiles.forget_tuned()


def guest(block=32, seconds=2e-3, op="conv2d", **more):
    """A 1x1 convolution, which looks up a matmul's tile: of the sizes of `row`."""
    return row(block, seconds=seconds, op=op, shape=dict(R=1), **more)


def test_a_guest_does_not_replace_what_an_operators_own_sweep_has_found(tmp_path):
    """Though it took longer, in one sweep or in the next; where nobody was, it is welcome."""
    path = tuned_table.save([row(64), guest(), guest(16, M=512)], tmp_path)
    assert blocks(path) == [16, 64]  # in the order of M
    assert ["by" in entry for entry in entries(path)] == [True, False]
    tuned_table.save([guest(128), guest(256, M=512)], tmp_path)
    assert blocks(path) == [256, 64]  # a guest takes a guest's place
    tuned_table.save([row(32, M=512, seconds=1.0)], tmp_path)
    assert blocks(path) == [32, 64] and not any("by" in entry for entry in entries(path))


def test_the_gradients_of_a_convolution_are_nobodys_guests(tmp_path):
    path = tuned_table.save([row(128, op="conv2d", tile_op="conv2d_input_grad")], tmp_path)
    assert "by" not in entries(path)[0]


@pytest.mark.core
def test_the_loop_is_closed(gpu):
    """A call gets the tile that the sweep found, and after the next sweep the better one."""

    def block(M):
        x = torch.empty(0, dtype=torch.bfloat16)
        return _tiles.choose_tile("matmul", x, DEFAULT, M=M, N=4096, K=4096)

    assert block(4096) == DEFAULT[2]
    path = tuned_table.save([row(128), row(256, seconds=0.9e-3), row(16, seconds=2e-3)])
    assert path == gpu / "nvidia-h200.json"
    assert block(4096) == row(256)["tile"]
    assert block(3000) == row(256)["tile"]  # the nearest shape
    tuned_table.save([row(128, seconds=0.8e-3)])
    assert block(4096) == row(128)["tile"]
    with _tiles.use_tile("matmul", {"BLOCK_M": 1}):
        assert block(4096) == {"BLOCK_M": 1}
    assert block(4096) == row(128)["tile"]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([row(16, seconds=3.0), row(32, seconds=1.0), row(64, seconds=2.0)], 32),
        ([row(16, seconds=1.0, stage="screen"), row(32, seconds=2.0)], 32),  # a finalist first
        ([row(16, seconds=1.0, stage="screen"), row(32, seconds=2.0, stage="screen")], 16),
        ([row(16, seconds=1.0, cache="hot"), row(32, seconds=2.0)], 32),
        ([row(16, seconds=1.0, status="wrong"), row(32, seconds=2.0)], 32),
        ([row(16, seconds=1.0, stage="compile"), row(32, seconds=2.0)], 32),
        ([row(16, seconds=1.0, impl="torch", tile=None), row(32, seconds=2.0)], 32),
        ([row(16, seconds=9.0, precision="tf32"), row(32, seconds=2.0)], 32),
        ([row(16, status="predicted", stage="compile", predicted_s=1e-4), row(32)], 32),
        # two workloads look up one entry: the longer one has more to lose
        ([row(16, seconds=1.0, shape={"R": 1}), row(32, seconds=9.0, shape={"R": 3})], 32),
        ([row(16, seconds=1.0), row(32, seconds=1.0)], 16),  # a tie has one order
    ],
)
def test_the_winner(rows, expected, tmp_path):
    for order in (rows, rows[::-1]):
        path = tuned_table.save(order, tmp_path)
        assert blocks(path) == [expected]
        path.unlink()


def test_entries_of_other_shapes_stay(tmp_path):
    tuned_table.save([row(16, M=64), row(32, M=128), row(64, M=128, dtype="float16")], tmp_path)
    path = tuned_table.save([row(128, M=128), row(256, M=8192)], tmp_path)
    found = [(e["dtype"], e["sizes"]["M"], e["tile"]["BLOCK_M"]) for e in entries(path)]
    bfloat16 = [("bfloat16", 64, 16), ("bfloat16", 128, 128), ("bfloat16", 8192, 256)]
    assert sorted(found) == sorted([*bfloat16, ("float16", 128, 64)])


def test_the_file_can_be_read_and_says_where_it_comes_from(tmp_path):
    rows = [row(M=128), row(M=64), row(M=128, op="conv2d", tile_op="conv2d", bound="memory")]
    path = tuned_table.save(rows, tmp_path)
    text = path.read_text()
    assert (
        json.loads(text)["gpu"] == GPU and "perf/report/tuned_table.py" in json.loads(text)["note"]
    )
    assert [line[:14] for line in text.splitlines() if line.startswith('{"op"')] == [
        '{"op": "conv2d', '{"op": "matmul', '{"op": "matmul'
    ]  # fmt: skip
    conv, matmul = entries(path)[:2]
    provenance = dict(
        measured="2026-03-04", source="abc", triton=importlib.metadata.version("triton")
    )
    assert conv.items() >= dict(gbps=100.0, **provenance).items() and "tflops" not in conv
    assert matmul.items() >= dict(tflops=137.4, **provenance).items()
    assert tuned_table.save(rows[::-1], tmp_path).read_text() == text
    assert "stage" not in matmul
    assert entries(tuned_table.save([row(stage="screen", M=1)], tmp_path))[1]["stage"] == "screen"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no row has a tile to save"),
        ([row(gpu="interpreter")], "no row has a tile to save"),
        ([row(status="predicted", median_s=None, predicted_s=1.0, stage="compile")], "no row has"),
        ([row(), row(gpu="NVIDIA A100")], "of one GPU, got NVIDIA A100, NVIDIA H200"),
    ],
)
def test_refuses(rows, message, tmp_path):
    with pytest.raises(PerfError, match=message):
        tuned_table.save(rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_left_as_it_is(tmp_path):
    path = tmp_path / "nvidia-h200.json"
    path.write_text('{"tiles": [')
    with pytest.raises(PerfError, match="not saved: .*nvidia-h200.json is not JSON"):
        tuned_table.save([row()], tmp_path)
    assert path.read_text() == '{"tiles": ['


def test_the_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tuned_table.save([row(16)], tmp_path)
    before = path.read_text()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PerfError, match="cannot write .*no space left"):
        tuned_table.save([row(32)], tmp_path)
    lock = tmp_path / ".nvidia-h200.json.lock"
    assert path.read_text() == before and set(tmp_path.iterdir()) == {path, lock}


def save_many(folder, begin, op):
    """One process of a test: saves entries of its own, one by one."""
    begin.wait()
    for M in range(1, 31):
        tuned_table.save([row(M=M, op=op, tile_op=op)], folder)


def test_two_processes_lose_no_entries_of_each_other(tmp_path):
    """Each reads the table, merges and replaces it: without a lock the later one wins."""
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(2)
    workers = [
        context.Process(target=save_many, args=(tmp_path, begin, op)) for op in ("matmul", "conv2d")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    found = sorted((e["op"], e["sizes"]["M"]) for e in entries(tmp_path / "nvidia-h200.json"))
    assert found == [(op, M) for op in ("conv2d", "matmul") for M in range(1, 31)]


def test_a_lock_that_nobody_gives_back_is_one_clear_line(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-h200.json"
    monkeypatch.setattr(results, "LOCK_S", 0.1)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold, args=(path, held))
    holder.start()
    assert held.wait(30)
    with pytest.raises(PerfError, match="another process has been writing .*nvidia-h200.json"):
        tuned_table.save([row()], tmp_path)
    holder.kill()  # and who is killed holds no lock
    holder.join()
    assert entries(tuned_table.save([row()], tmp_path))


def hold(path, held):
    with results.locked(path):
        held.set()
        time.sleep(60)

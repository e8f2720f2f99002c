"""Training: the twin's losses, exact resumption after any kind of stop, and every user's error."""

import contextlib
import functools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tools.inputs import DEVICE, double
from tilelab.__main__ import main
from tilelab.kernels import SGD, AdamW, cross_entropy
from tilelab.nets import checkpoint, data, models, train
from tilelab.nets.config import Config, ConfigError
from tilelab.nets.data import DataError
from tilelab.nets.imagenet import VGG16
from tilelab.nets.models import TorchCNN, build
from tilelab.nets.train import Images, evaluate, fit, learning_rate, scores

ROOT = Path(__file__).parents[2]
# A whole run in half a second: 4 epochs of 2 steps.
TINY = {"model": "mlp", "limit": 32, "batch_size": 16, "epochs": 4}
FLAGS = [
    word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))
]


def tiny(out, **options):
    return fit(Config(**{**TINY, "out": str(out), **options}), progress=False)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take a second a run, longer than everything else: only tests of them draw."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr(train, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the result of an unbroken run of TINY. Tests copy it and leave it alone."""
    out = tmp_path_factory.mktemp("finished")
    return out, tiny(out)


def copied(finished, folder, epochs=4):
    """A copy of the finished run, as it was after some epochs."""
    folder.mkdir()
    for path in finished[0].iterdir():
        if not path.name.startswith("checkpoint") or int(path.stem[-3:]) <= epochs:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def same_run(one, other):
    """Every loss of every step, every metric but the times, and every weight: bit for bit."""
    assert torch.equal(one.losses, other.losses) and len(one.losses) > 0
    assert untimed(one.history) == untimed(other.history)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    return True


def untimed(history):
    times = ("seconds", "eval_seconds", "images_per_second")
    return [{key: line[key] for key in line if key not in times} for line in history]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def cli(arguments, capsys):
    """Exit code and the two outputs of the command line, run in this process."""
    try:
        code = main(["train", *(str(argument) for argument in arguments)])
    except SystemExit as exit:  # argparse's way out
        code = exit.code
    output = capsys.readouterr()
    return code, output.out, output.err


# --- the arithmetic of training -----------------------------------------------------------------


def ten_losses(model, optimizer, loss_of, dtype):
    """Losses of ten steps on the same 16 digits, whose labels alternate between runs of classes."""
    digits = data.load(limit=16)
    x = (digits.train_images.to(DEVICE, dtype) / 255 - 0.13)[:, None] / 0.31
    labels, losses = digits.train_labels.to(DEVICE), []
    for _ in range(10):
        loss = loss_of(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


OPTIMIZERS = {
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.003, "weight_decay": 0.1}),
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("cnn", "adamw"), ("cnn-unfused", "sgd"), ("cnn-im2col", "adamw")],
)
def test_ten_losses_are_those_of_torch(name, optimizer):
    ours, theirs, options = OPTIMIZERS[optimizer]
    torch.manual_seed(0)
    model = build(name, (1, 28, 28), 10)
    twin = TorchCNN((1, 28, 28), 10).double().to(DEVICE)
    twin.load_state_dict(model.state_dict())
    model.to(DEVICE)
    other = TorchCNN((1, 28, 28), 10).double().to(DEVICE)
    other.load_state_dict(twin.state_dict())

    got = ten_losses(model, ours(model.parameters(), **options), cross_entropy, torch.float32)
    want = ten_losses(twin, theirs(twin.parameters(), **options), F.cross_entropy, torch.float64)
    # Rounding errors grow from step to step, since each step starts from what the last one left:
    # float32 against float64 differs by 1e-7 to 1e-5 here.
    np.testing.assert_allclose(got, want, rtol=1e-4)
    # Teeth: the network learns, and a learning rate that is wrong by 1% would have shown.
    assert want[-1] < 0.7 * want[0]
    wrong = {**options, "lr": 1.01 * options["lr"]}
    off = ten_losses(other, theirs(other.parameters(), **wrong), F.cross_entropy, torch.float64)
    assert np.abs(off / want - 1).max() > 1e-3


def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_nothing():
    rates = [learning_rate(step, 200, 0.5) for step in range(200)]
    assert rates[:20] == pytest.approx([0.5 * (i + 1) / 20 for i in range(20)])
    assert rates[20:] == pytest.approx([0.5 * (200 - i) / 180 for i in range(20, 200)])
    assert min(rates) > 0 and max(rates) == 0.5


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11])
def test_the_learning_rate_of_few_steps(steps):
    rates = [learning_rate(step, steps, 1.0) for step in range(steps)]
    assert 0 < min(rates) and max(rates) == rates[0] == 1.0


def test_scores_are_macro_means_over_the_classes_that_occur():
    # Class 2 was never predicted (precision 0), class 3 neither occurs nor was predicted.
    confusion = torch.tensor([[3, 1, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    accuracy, precision, recall = scores(confusion)
    assert accuracy == pytest.approx(5 / 8)
    assert precision == pytest.approx((3 / 5 + 2 / 3 + 0) / 3)
    assert recall == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert scores(confusion.T)[1:] == pytest.approx((recall, precision))


def test_evaluate_is_what_torch_computes_in_float64(monkeypatch):
    monkeypatch.setattr(train, "EVAL_BATCH", 7)  # several batches, the last one smaller
    images = torch.randint(0, 256, (17, 12, 12), dtype=torch.uint8)
    labels = torch.arange(17) % 3
    model = build("mlp", (1, 12, 12), 3).to(DEVICE)
    part = Images(images, labels, 100.0, 50.0, torch.device(DEVICE))
    result = evaluate(model, part, 3)
    x = double((images.double() - 100) / 50).flatten(1)
    w1, b1, w2, b2 = (value.cpu().double() for value in model.state_dict().values())
    logits = (x @ w1.T + b1).relu() @ w2.T + b2
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    torch.testing.assert_close(result.probability.double(), logits.softmax(1), atol=1e-5, rtol=0)
    want = torch.zeros(3, 3, dtype=torch.int64)
    for true, predicted in zip(labels, logits.argmax(1), strict=True):
        want[true, predicted] += 1
    assert torch.equal(result.confusion, want) and not torch.equal(want, want.T)


# --- a run and what it leaves -------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything(finished):
    out, result = finished
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", "metrics.jsonl", *train.PICTURES]
        + [f"checkpoint-00{epoch}.pt" for epoch in range(5)]
    )
    lines = metrics(out)
    assert lines == result.history and [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert (
        list(lines[0])
        == (
            "epoch train_loss test_loss train_accuracy accuracy precision recall seconds "
            "eval_seconds images_per_second lr"
        ).split()
    )
    for line in lines:
        steps = result.losses[2 * line["epoch"] - 2 : 2 * line["epoch"]]
        assert line["train_loss"] == pytest.approx(steps.double().mean().item())
        assert all(0 <= line[key] <= 1 for key in ("accuracy", "precision", "recall"))
        # Both are rounded, to 1/10 image and 1/1000 second.
        slow, fast = (32 / (line["seconds"] + error) for error in (0.6e-3, -0.6e-3))
        assert slow - 0.06 < line["images_per_second"] < fast + 0.06
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["lr"] == 0.008 and about["config"]["model"] == "mlp"
    assert about["data"]["train"] == about["data"]["held_out"] == 32
    assert about["environment"]["torch"] == torch.__version__
    for name in train.PICTURES:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_seed_is_the_same_run_and_another_is_not(finished, tmp_path):
    torch.manual_seed(99)  # the caller's random numbers have no say, and are left alone
    before = torch.get_rng_state()
    assert same_run(tiny(tmp_path / "a"), finished[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(tiny(tmp_path / "b", seed=1).losses, finished[1].losses)


def test_a_checkpoint_is_the_networks_state_at_the_end(finished):
    out, result = finished
    state = checkpoint.load(out / "checkpoint-004.pt")
    digits = data.load(limit=32)
    twin = build("mlp", digits.shape, 10)
    twin.load_state_dict(state["model"])  # a plain state_dict
    part = Images(digits.test_images, digits.test_labels, *digits.mean_std(), torch.device("cpu"))
    if DEVICE == "cpu":
        assert evaluate(twin, part, 10).loss == result.history[-1]["test_loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"model": "cnn"},
        {"model": "cnn-unfused"},
        {"model": "cnn-im2col"},
        {"model": "cnn-torch", "optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"label_smoothing": 0.1, "shift": 0},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "model": "cnn"},
        {"dtype": "bfloat16", "model": "cnn"},
        {"batch_size": 1000},  # larger than the data: one step an epoch
        {"batch_size": 48},  # the last batch is smaller
    ],
    ids=str,
)
def test_every_kind_of_run_works(tmp_path, options):
    result = tiny(tmp_path, **{"epochs": 1, "limit": 64, "batch_size": 32, **options})
    assert result.losses.isfinite().all() and 1 < result.history[0]["test_loss"] < 4
    assert all(value.dtype == torch.float32 for value in result.model.parameters())
    steps = {1000: 1, 48: 2}.get(options.get("batch_size"), 2)
    assert len(result.losses) == steps
    if steps == 2 and "batch_size" in options:  # the epoch's loss weighs images, not steps
        want = (48 * result.losses[0] + 16 * result.losses[1]) / 64
        assert result.history[0]["train_loss"] == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(("dtype", "eps"), [("float16", 2**-10), ("bfloat16", 2**-7)])
def test_mixed_precision_is_float32_up_to_rounding(tmp_path, finished, dtype, eps):
    result = tiny(tmp_path, dtype=dtype, epochs=1)
    want = tiny(tmp_path / "float32", epochs=1).losses
    # Two roundings a layer, forward and backward, over two steps; and not float32 in disguise.
    assert (result.losses / want - 1).abs().max() < 16 * eps
    assert not torch.equal(result.losses, want)


def test_a_folder_of_colourless_images_of_any_size_can_be_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (20, 12, 15), dtype=np.uint8)
        data.write_idx(tmp_path / "set" / f"{part}-images-idx3-ubyte", images)
        data.write_idx(
            tmp_path / "set" / f"{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 4
        )
    result = tiny(tmp_path / "run", dataset=str(tmp_path / "set"), model="cnn", epochs=1)
    assert result.model.state_dict()["fc.weight"].shape == (4, 32 * 1 * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_demo_on_a_gpu(tmp_path, dtype):
    result = fit(Config(out=str(tmp_path), dtype=dtype), progress=False)
    assert result.history[-1]["accuracy"] > 0.95


# --- stopped and resumed ------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_resumed_run_is_an_unbroken_one(finished, tmp_path, epochs):
    out = copied(finished, tmp_path / "run", epochs)
    state = checkpoint.load_newest(out)
    assert state["epoch"] == epochs
    result = fit(Config(**TINY, out=str(out)), resume=state, progress=False)
    assert same_run(result, finished[1]) and untimed(metrics(out)) == untimed(finished[1].history)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "sgd"}, {"dtype": "float16"}, {"model": "cnn", "epochs": 2, "limit": 16}],
    ids=str,
)
def test_resuming_takes_the_optimizer_and_the_scaler_along(tmp_path, options):
    options = {"limit": 32, "epochs": 3, **options}
    want = tiny(tmp_path, **options)
    out = tmp_path / "resumed"
    state = checkpoint.load(tmp_path / "checkpoint-001.pt")
    result = fit(Config(**{**TINY, **options, "out": str(out)}), resume=state, progress=False)
    assert same_run(result, want)
    state["optimizer"]["state"].clear()  # teeth: momentum matters
    (tmp_path / "forgetful").mkdir()
    forgetful = Config(**{**TINY, **options, "out": str(tmp_path / "forgetful")})
    with contextlib.suppress(Exception):  # refusing such a checkpoint would be right as well
        result = fit(forgetful, resume=state, progress=False)
        assert not torch.equal(result.losses, want.losses)


def test_a_checkpoint_whose_steps_the_host_counted_is_resumed(finished, tmp_path):
    """As they were before steps could be in a CUDA graph."""
    state = checkpoint.load(finished[0] / "checkpoint-001.pt")
    (group,) = state["optimizer"]["param_groups"]
    assert group.pop("capturable") and isinstance(group["lr"], float)
    result = fit(Config(**TINY, out=str(tmp_path / "run")), resume=state, progress=False)
    assert same_run(result, finished[1])


@pytest.mark.gpu
def test_a_cuda_graph_changes_no_loss(tmp_path):
    for dtype in ("float32", "bfloat16"):
        options = dict(model="cnn", dtype=dtype, limit=1000, batch_size=64)
        runs = [
            tiny(tmp_path / f"{dtype}{graph}", cuda_graph=graph, **options)
            for graph in (True, False)
        ]
        assert same_run(*runs)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_cuda_graph_needs_a_gpu(tmp_path, capsys):
    code, _, err = cli([*FLAGS, "--cuda-graph", "--out", tmp_path], capsys)
    assert code == 2 and "--cuda-graph: there is no GPU here" in err
    code, _, _ = cli([*FLAGS, "--no-cuda-graph", "--epochs", 1, "--out", tmp_path], capsys)
    assert code == 0


def test_moments_as_torch_has_them_are_taken_over_too(tmp_path):
    """Of the weights that read an image: [out, C*H*W], as before FlattenLinear."""
    options = {"model": "cnn", "limit": 32, "epochs": 2}
    want = tiny(tmp_path / "run", **options)
    state = checkpoint.load(tmp_path / "run" / "checkpoint-001.pt")
    moments = state["optimizer"]["state"][4]  # conv1's two, conv2's two, fc.weight
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments[name].shape == (10, 32, 5, 5)
        moments[name] = moments[name].flatten(1)
    config = Config(**{**TINY, **options, "out": str(tmp_path / "resumed")})
    assert same_run(fit(config, resume=state, progress=False), want)


def test_vgg16_trains_on_images_of_32_pixels_and_says_that_28_are_too_small(
    tmp_path, monkeypatch, capsys
):
    code, _, err = cli(["--model", "vgg16", "--out", tmp_path / "small"], capsys)
    assert code == 2 and err.count("\n") == 1
    assert "--model vgg16: images must be at least 32 x 32" in err and "28 x 28" in err

    monkeypatch.setattr(models, "VGG16", functools.partial(VGG16, width=4))  # else 134 million
    folder = tmp_path / "set"
    folder.mkdir()
    for part in ("train", "t10k"):
        images = np.random.default_rng(0).integers(0, 256, (12, 32, 33), dtype=np.uint8)
        data.write_idx(folder / f"{part}-images-idx3-ubyte", images)
        data.write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(12, dtype=np.uint8) % 3)
    result = tiny(tmp_path / "run", dataset=str(folder), model="vgg16", epochs=2, lr=0.001)
    assert result.model.state_dict()["classifier.0.weight"].shape == (256, 32)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def started(out, *more):
    """Start a training in a process of its own."""
    # Where tests run in the background, SIGINT is ignored and children inherit that.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "tilelab", "train", "--out", str(out), *map(str, more)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path} in a minute"
        time.sleep(0.005)


LONG = {**TINY, "model": "cnn", "limit": 64, "batch_size": 32, "epochs": 4}
LONG_FLAGS = [
    word for name, value in LONG.items() for word in (f"--{name.replace('_', '-')}", str(value))
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return fit(Config(**LONG, out=str(tmp_path_factory.mktemp("unbroken"))), progress=False)


def test_kill_9_and_resume(tmp_path, unbroken, capsys):
    out = tmp_path / "run"
    process = started(out, *LONG_FLAGS)
    wait_for(out / "checkpoint-001.pt", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert all(line["epoch"] == i + 1 for i, line in enumerate(metrics(out)))
    assert not (out / "curves.png").exists()  # it was not over
    code, _, err = cli(["--resume", out], capsys)  # no other flag: they are in the checkpoint
    assert code == 0, err
    final = checkpoint.load(out / "checkpoint-004.pt")
    assert torch.equal(final["losses"], unbroken.losses)
    assert untimed(metrics(out)) == untimed(unbroken.history)


def test_ctrl_c_and_resume(tmp_path, unbroken):
    out = tmp_path / "a run"  # a space: the command it prints must be quoted
    process = started(out, *LONG_FLAGS)
    wait_for(out / "checkpoint-001.pt", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    stopped, command = err.strip().splitlines()[-2:]
    assert stopped == f"stopped; the last checkpoint is {checkpoint.find(out)[0]}"
    assert command.startswith("continue with: tilelab train --resume ")
    assert main(shlex.split(command)[3:]) == 0
    assert untimed(metrics(out)) == untimed(unbroken.history)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("call", range(5))
def test_a_stop_at_any_rename_leaves_a_run_that_resumes(finished, tmp_path, monkeypatch, call):
    """Stop just before each of the first files gets its name, the worst moment there is."""
    replace, count = os.replace, 0

    def stopping(source, target):
        nonlocal count
        if count == call:
            raise Stopped
        count += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(Stopped):
        tiny(tmp_path / "run")
    monkeypatch.undo()
    out = tmp_path / "run"
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]
    if not checkpoint.find(out):  # stopped before the first: start again
        assert same_run(fit(Config(**TINY, out=str(out)), None, True, False), finished[1])
        return
    result = fit(Config(**TINY, out=str(out)), checkpoint.load_newest(out), progress=False)
    assert same_run(result, finished[1]) and metrics(out) == result.history


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole + b'{"epoch": 3, "train_lo',
        lambda whole: whole[:-20],
        lambda whole: whole + b"\xff\0\xff",
        lambda whole: b"",
    ],
    ids=["a torn line", "half a line lost", "no text", "empty"],
)
def test_metrics_follow_the_checkpoint(finished, tmp_path, capsys, damage):
    out = copied(finished, tmp_path / "run", epochs=2)  # and four lines of metrics
    path = out / "metrics.jsonl"
    path.write_bytes(damage(b"".join(path.read_bytes().splitlines(True)[:2])))
    code, _, err = cli(["--resume", out], capsys)
    assert code == 0 and f"note: {path} is brought to epoch 2" in err
    assert untimed(metrics(out)) == untimed(finished[1].history)
    assert metrics(out)[:2] == finished[1].history[:2]  # the times of what was not repeated


def test_epochs_after_the_checkpoint_are_dropped_from_the_metrics(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "run", epochs=1)
    assert len(metrics(out)) == 4
    state = checkpoint.load_newest(out)
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", lambda *_: (_ for _ in ()).throw(Stopped))
        fit(Config(**TINY, out=str(out)), state, progress=False)
    assert metrics(out) == finished[1].history[:1]
    assert "is brought to epoch 1" in capsys.readouterr().err


# --- checkpoints that are damaged ---------------------------------------------------------------


def test_a_damaged_newest_checkpoint_costs_one_epoch(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "run", epochs=3)
    torn = out / "checkpoint-003.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    code, _, err = cli(["--resume", out], capsys)
    assert code == 0 and f"note: checkpoint {torn} is damaged" in err
    assert "going back to checkpoint-002.pt" in err
    assert torch.equal(checkpoint.load(out / "checkpoint-004.pt")["losses"], finished[1].losses)
    checkpoint.load(torn)  # it was made anew


def test_no_good_checkpoint_is_one_line(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "run", epochs=1)
    for path in checkpoint.find(out):
        path.write_bytes(b"no checkpoint")
    code, _, err = cli(["--resume", out], capsys)
    assert code == 2 and err.count("\n") == 1 and "no good checkpoint in" in err


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


def test_no_flipped_bit_changes_what_is_loaded(finished, tmp_path):
    """Each of 300 damaged files is refused, or (where a bit means nothing) loads the same."""
    raw = (finished[0] / "checkpoint-001.pt").read_bytes()
    path = tmp_path / "flipped.pt"
    path.write_bytes(raw)
    want, refused, rng = checkpoint.load(path), 0, random.Random(0)
    for _ in range(300):
        position, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
        path.write_bytes(raw[:position] + bytes([raw[position] ^ bit]) + raw[position + 1 :])
        try:
            assert equal(checkpoint.load(path), want)
        except checkpoint.CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200  # most of the file is weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"# text", "is damaged"),
        (0.5, "is damaged"),
        ({"weight": torch.zeros(2)}, "not a checkpoint of tilelab.nets.train"),
        (torch.zeros(2), "not a checkpoint of tilelab.nets.train"),
    ],
    ids=["empty", "text", "the first half", "another's", "a tensor"],
)
def test_what_is_no_checkpoint_is_one_line(finished, tmp_path, capsys, content, message):
    path = tmp_path / "checkpoint-001.pt"
    if isinstance(content, float):
        content = (finished[0] / path.name).read_bytes()[:20_000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    code, _, err = cli(["--resume", path], capsys)
    assert code == 2 and err.count("\n") == 1 and message in err and str(path) in err


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, tmp_path / "a.pt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_that_does_not_fit_the_network(finished, tmp_path):
    state = checkpoint.load(finished[0] / "checkpoint-001.pt")
    state["model"]["fc1.weight"] = torch.zeros(3, 3)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit: .*fc1.weight") as error:
        fit(Config(**TINY, out=str(tmp_path)), state, progress=False)
    assert "\n" not in str(error.value)


# --- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", "cnn"),
        ("--epochs", 5),
        ("--batch-size", 8),
        ("--optimizer", "sgd"),
        ("--lr", 0.1),
        ("--weight-decay", 0.5),
        ("--label-smoothing", 0.2),
        ("--shift", 3),
        ("--limit", 16),
        ("--seed", 7),
        ("--dtype", "float16"),
    ],
)
def test_a_resumed_run_whose_flags_contradict_the_checkpoint_is_refused(
    finished, tmp_path, capsys, flag, value
):
    out = copied(finished, tmp_path / "run", epochs=1)
    code, _, err = cli(["--resume", out, flag, value], capsys)
    assert code == 2 and err.count("\n") == 1
    assert f"{flag} {value} contradicts the checkpoint" in err
    assert len(checkpoint.find(out)) == 2  # nothing was touched


def test_the_same_flags_again_are_no_contradiction(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "run", epochs=3)
    code, _, err = cli([*FLAGS, "--lr", "0.008", "--out", out, "--resume"], capsys)
    assert code == 0, err


def test_other_data_than_the_checkpoints_are_refused(finished, tmp_path, capsys, monkeypatch):
    out = copied(finished, tmp_path / "run", epochs=1)
    changed = data.load(limit=32)
    changed.train_images[0, 0, 0] += 1
    monkeypatch.setattr(data, "load", lambda *_: changed)
    code, _, err = cli(["--resume", out], capsys)
    assert code == 2 and "--dataset mnist5k is not the data that the checkpoint was" in err


def test_a_run_can_be_resumed_into_another_folder(finished, tmp_path, capsys):
    out = tmp_path / "other"
    code, _, err = cli(["--resume", finished[0] / "checkpoint-002.pt", "--out", out], capsys)
    assert code == 0, err
    assert untimed(metrics(out)) == untimed(finished[1].history)
    assert [path.name for path in checkpoint.find(out)][-1] == "checkpoint-002.pt"


def test_without_out_a_run_gets_a_folder_of_its_own(tmp_path, capsys, monkeypatch):
    """`make train` twice must neither fail nor lose the first run."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "mlp", "--limit", "16", "--epochs", "1"]
    for name in ("mnist5k-mlp-seed0", "mnist5k-mlp-seed0-2", "mnist5k-mlp-seed0-3"):
        code, out, _ = cli(flags, capsys)
        assert code == 0 and f"written to runs/{name}:" in out
    code, out, _ = cli([*flags, "--resume"], capsys)  # the last of them, which is finished
    assert code == 0 and "runs/mnist5k-mlp-seed0-3" in out
    code, out, _ = cli([*flags, "--overwrite"], capsys)
    assert code == 0 and "written to runs/mnist5k-mlp-seed0:" in out


def test_a_finished_run_that_is_resumed_gets_its_pictures_back(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "run")
    (out / "filters.png").unlink()
    code, _, _ = cli(["--resume", out], capsys)
    assert (
        code == 0
        and (out / "filters.png").read_bytes() == (finished[0] / "filters.png").read_bytes()
    )
    assert metrics(out) == finished[1].history


def test_a_run_is_not_overwritten_unasked(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = cli([*FLAGS, "--out", out], capsys)
    assert code == 2 and err.count("\n") == 1 and "--resume" in err and "--overwrite" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    code, _, err = cli([*FLAGS, "--out", out, "--overwrite", "--epochs", 1, "--seed", 1], capsys)
    assert code == 0, err
    assert [path.name for path in checkpoint.find(out)] == [
        "checkpoint-001.pt",
        "checkpoint-000.pt",
    ]
    assert len(metrics(out)) == 1 and (out / "notes.txt").read_text() == "mine"

    # Nor by a run that comes from elsewhere.
    code, _, err = cli(["--resume", finished[0], "--out", out], capsys)
    assert code == 2 and "already holds a run" in err


def test_no_flags_are_the_demo():
    config = Config()
    assert (config.dataset, config.model, config.epochs, config.batch_size) == (
        "mnist5k", "cnn", 3, 64,
    )  # fmt: skip
    assert (config.optimizer, config.lr, config.weight_decay, config.seed) == (
        "adamw", 0.008, 0.01, 0,
    )  # fmt: skip
    assert config.out == "runs/mnist5k-cnn-seed0"
    assert Config(dataset="some/emnist-letters", seed=3).out == "runs/emnist-letters-cnn-seed3"


WRONG = {
    "a flag that is none": (["--epoch-count", 3], "unrecognized arguments: --epoch-count"),
    "a word": (["--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
    "no value": (["--lr"], "argument --lr: expected one argument"),
    "a model that is none": (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
    "a device that is none": (["--device", "tpu"], "argument --device: invalid choice"),
    "resume and overwrite": (["--resume", "--overwrite"], "not allowed with"),
    "no epochs": (["--epochs", 0], "--epochs must be from 1"),
    "empty batches": (["--batch-size", 0], "--batch-size must be from 1"),
    "a graph of float16": (
        ["--cuda-graph", "--dtype", "float16"],
        "--cuda-graph does not go with --dtype float16",
    ),
    "a negative rate": (["--lr", -1], "--lr must be from 0.0"),
    "a rate that is none": (["--lr", "nan"], "--lr must be from 0.0"),
    "an infinite rate": (["--lr", "inf"], "--lr must be from 0.0"),
    "a negative decay": (["--weight-decay", -1], "--weight-decay must be"),
    "momentum of 2": (["--optimizer", "sgd", "--momentum", 2], "--momentum must be from 0.0"),
    "momentum of adamw": (["--momentum", 0.5], "--momentum belongs to --optimizer sgd"),
    "too much smoothing": (["--label-smoothing", 1.5], "--label-smoothing must be"),
    "a negative shift": (["--shift", -1], "--shift must be from 0"),
    "a shift out of sight": (["--shift", 28], "--shift 28 moves images of 28 x 28"),
    "no images": (["--limit", 0], "--limit must be from 1"),
    "a negative seed": (["--seed", -1], "--seed must be from 0"),
    "a folder that is none": (["--dataset", "no/such/folder"], "no data set or folder"),
    "data-dir without download": (["--data-dir", "."], "--data-dir is where downloads are kept"),
    "nothing to resume": (["--resume", "no/such/run"], "no checkpoint to resume in no/such/run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_flag_is_one_clear_line_and_exit_code_2(tmp_path, capsys, case):
    flags, message = WRONG[case]
    code, _, err = cli(["--out", tmp_path / "run", *flags], capsys)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert err.startswith("error: ") and "Traceback" not in err
    assert not list(tmp_path.glob("run/checkpoint-001.pt"))


def test_a_loss_that_explodes_is_one_clear_line_and_is_not_saved(tmp_path, capsys):
    flags = [*FLAGS, "--optimizer", "sgd", "--lr", 1e6, "--out", tmp_path]
    code, _, err = cli(flags, capsys)
    assert code == 2 and err.count("\n") == 1, err
    assert "the loss is not finite any more in epoch" in err and "smaller --lr than 1000000" in err
    newest = checkpoint.load_newest(tmp_path)
    assert all(value.isfinite().all() for value in newest["model"].values())


def test_out_that_cannot_be_written_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, _, err = cli([*FLAGS, "--out", out], capsys)
        assert code == 2 and err.count("\n") == 1 and str(tmp_path / "file") in err


def test_a_full_disk_is_one_clear_line(tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = cli([*FLAGS, "--out", tmp_path], capsys)
    assert code == 2 and err == "error: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = cli([*FLAGS, "--out", tmp_path, "--device", "cuda"], capsys)
    assert code == 2 and err.count("\n") == 1 and "sees no GPU" in err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "INTERPRET", False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        train.pick_device("cpu")
    assert train.pick_device("auto") == train.pick_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(train, "INTERPRET", True)
    assert train.pick_device("auto") == torch.device("cpu")


def test_errors_are_exceptions_in_python(tmp_path):
    with pytest.raises(ConfigError, match="--optimizer must be one of adamw, sgd; got 'lion'"):
        Config(optimizer="lion")
    with pytest.raises(DataError, match="no data set"):
        fit(Config(dataset=str(tmp_path / "none"), out=str(tmp_path / "run")))


def test_help_tells_every_default(capsys):
    code, out, _ = cli(["--help"], capsys)
    assert code == 0
    for flag, default in {
        "--dataset": "mnist5k", "--epochs": "3", "--batch-size": "64", "--seed": "0",
        "--lr": "0.008 for adamw and 0.05 for sgd", "--model": "cnn", "--device": "auto",
        "--optimizer": "adamw", "--dtype": "float32", "--shift": "1",
    }.items():  # fmt: skip
        text = " ".join(out.partition(f"\n  {flag} ")[2].split()[:60])
        assert f"(default: {default})" in text, flag


def test_the_output_is_a_line_per_epoch(tmp_path, capsys):
    code, out, err = cli([*FLAGS, "--out", tmp_path], capsys)
    assert code == 0 and err == ""  # no bar where stderr is no terminal
    lines = out.splitlines()
    assert lines[0] == "mnist5k: 32 training and 32 held-out images of 28 x 28, 10 classes"
    assert lines[1].startswith("mlp: 101,770 parameters, float32, ")
    assert lines[2] == train.HEADER
    assert [line.split()[0] for line in lines[3:7]] == ["1", "2", "3", "4"]
    assert all(len(line) == len(train.HEADER) for line in lines[3:7])
    assert lines[7].startswith(f"written to {tmp_path}: checkpoint-004.pt") and len(lines) == 8
    tiny(tmp_path / "silent", epochs=1)
    assert capsys.readouterr() == ("", "")


def test_importing_does_not_wait_for_what_few_need():
    few = "{'matplotlib', 'pooch', 'requests'}"
    code = f"import tilelab.nets.train, sys; print({few} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "set()\n" and out.stderr == ""

"""Train a network on images with our kernels: `tilelab train`, or `fit` from Python.

The recipe is AdamW, a short linear warm-up of the learning rate, then a linear decay. Training
images are shifted by up to one pixel. There are no other tricks.

The same flags and seed give the same losses on the same machine, bit for bit. A run that was killed
and resumed gives the same losses as an unbroken one, for these reasons:

- The order of the images and their shifts are computed from (seed, epoch). No random generator
  carries a state from one epoch to the next.
- The learning rate depends on the number of the step, and on the flags.
- A step that is replayed from a CUDA graph (nets/step.py) launches what a step without one does.
- Every checkpoint holds the parameters, the optimizer's state and the metrics so far.

A run writes these files into its folder (--out): config.json (flags, data, versions), metrics.jsonl
(a line for each epoch), checkpoint-NNN.pt (one after each epoch; 000 is the untrained network) and
four pictures.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tilelab.kernels import SGD, AdamW, cross_entropy, softmax
from tilelab.kernels._launch import INTERPRET

from . import checkpoint as ckpt
from . import data as datasets
from .config import DTYPES, WARMUP, Config, ConfigError, check_same
from .config import add_arguments as add_arguments  # `tilelab train` is made of this and of `run`.
from .files import numbered, write_whole
from .models import build
from .step import TrainStep

# Evaluation uses a large batch: without a GPU, a launch takes longer than the arithmetic of 100
# images.
EVAL_BATCH = 1000
PICTURES = ("curves.png", "confusion.png", "filters.png", "mistakes.png")


class Evaluation(NamedTuple):
    """The results of a network on labelled images.

    Attributes:
        loss: the mean cross-entropy, in nats.
        confusion: int64 [classes, classes]. Rows are true classes, columns are predicted ones.
        probability: float32 [N, classes], on the CPU.
    """

    loss: float
    confusion: Tensor
    probability: Tensor


class Result(NamedTuple):
    """What `fit` returns: the trained model, a dict for each epoch, and float32 losses [steps]."""

    model: nn.Module
    history: list[dict]
    losses: Tensor


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up to the peak, then linear decay to 0.

    Steps count from 0.
    """
    warmup = max(1, int(WARMUP * steps))
    return peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def scores(confusion: Tensor) -> tuple[float, float, float]:
    """Return the accuracy, precision and recall of a confusion matrix [true, predicted].

    Precision and recall are means over the classes ("macro"). A class that was never predicted has
    precision 0. A class that neither occurs nor was predicted is left out.
    """
    confusion = confusion.double()
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    seen = (true + predicted) > 0
    precision = (hits / predicted.clamp(min=1))[seen].mean()
    recall = (hits / true.clamp(min=1))[seen].mean()
    return (hits.sum() / true.sum()).item(), precision.item(), recall.item()


class Images:
    """One part of a data set on a device. `input` makes the network's input from images."""

    def __init__(self, images, labels, mean, std, device):
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = mean, std

    def input(self, images: Tensor) -> Tensor:
        """Return images, uint8 [N, H, W], as standardised float32 [N, 1, H, W] in channels_last."""
        x = (images.float() - self.mean) / self.std
        return x[:, None].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(
    model: nn.Module, part: Images, classes: int, dtype: torch.dtype = torch.float32
) -> Evaluation:
    """Run the model on all images of a part, and compare its answers with the labels."""
    model.eval()
    device = part.labels.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    probability = []
    for images, labels in zip(
        part.images.split(EVAL_BATCH), part.labels.split(EVAL_BATCH), strict=True
    ):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(part.input(images)).float()
        loss += cross_entropy(logits, labels, reduction="sum")
        confusion += torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
        probability.append(softmax(logits).cpu())
    return Evaluation(
        loss.item() / len(part.labels),
        confusion.cpu().view(classes, classes),
        torch.cat(probability),
    )


def train_epoch(step: TrainStep, config: Config, epoch: int, bar):
    """Train for one epoch. Epochs count from 1.

    Returns:
        The loss of every step, float32 [steps] on the CPU; the mean loss of the images; and the
        accuracy. All three are taken during training: from shifted images, while the network
        changes.
    """
    step.model.train()
    count, steps = len(step.labels), len(step.sizes)
    rates = [
        learning_rate(i, config.epochs * steps, config.lr)
        for i in range((epoch - 1) * steps, epoch * steps)
    ]
    order, moves = datasets.epoch_order(count, config.seed, epoch, config.shift)
    step.begin(order, moves, torch.tensor(rates))
    shown, seen = time.perf_counter(), 0
    for i in range(steps):
        seen += step.step()
        # Reading a number makes the CPU wait for the GPU, so this happens every 0.2 s only.
        if (now := time.perf_counter()) - shown > 0.2:
            shown = now
            loss, right = step.losses[i].item(), step.right.item()
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {right / seen:.1%}", refresh=False)
        bar.update()
    # .cpu() and .item() wait for the GPU, so the caller's clock measures all of the work.
    losses = step.losses.cpu()
    sizes = torch.tensor(step.sizes)  # The last batch may be smaller.
    return losses, (losses.double() * sizes).sum().item() / count, step.right.item() / count


class _Run:
    """The state of a run: everything that a checkpoint holds."""

    def __init__(self, config: Config, data, device: torch.device):
        """Make the network and the optimizer as they are before the first step."""
        self.config, self.out, self.checksum = config, Path(config.out), data.checksum()
        with torch.random.fork_rng(devices=[]):  # The caller's random numbers stay as they are.
            torch.manual_seed(config.seed)
            try:
                self.model = build(config.model, data.shape, len(data.classes)).to(device)
            except ValueError as error:
                raise ConfigError(f"--model {config.model}: {error}") from error
        parameters = self.model.parameters()
        if config.optimizer == "adamw":
            self.optimizer = AdamW(
                parameters, config.lr, weight_decay=config.weight_decay, capturable=True
            )
        else:
            self.optimizer = SGD(
                parameters,
                config.lr,
                config.momentum,
                nesterov=config.momentum > 0,
                weight_decay=config.weight_decay,
            )
        # The smallest positive float16 is 6e-8: smaller gradients would become 0. So the scaler
        # multiplies the loss, and skips steps whose gradients overflow. It does nothing for the
        # other dtypes.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
        self.epoch, self.history, self.losses = 0, [], torch.zeros(0)

    def restore(self, state: dict) -> None:
        """Continue from the state in a checkpoint."""
        if state["checksum"] != self.checksum:
            raise ConfigError(
                f"--dataset {self.config.dataset} is not the data that the "
                f"checkpoint was trained on ({state['config']['dataset']})"
            )
        optimizer = {**state["optimizer"]}
        # Older checkpoints come from an AdamW whose steps the host counted (capturable=False).
        if self.config.optimizer == "adamw":
            groups = optimizer["param_groups"]
            optimizer["param_groups"] = [{**group, "capturable": True} for group in groups]
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ckpt.CheckpointError(
                f"checkpoint {state['path']} does not fit: {reason}"
            ) from error
        # A checkpoint may hold the state for a FlattenLinear in the shape of torch.nn.Linear.
        for p, moments in self.optimizer.state.items():
            for name, x in moments.items():
                if p.dim() == 4 and x.dim() == 2:
                    moments[name] = x.reshape(p.shape)
        self.epoch, self.history = state["epoch"], list(state["history"])
        self.losses = state["losses"]

    def write(self) -> None:
        """Write a checkpoint, and the metrics of all epochs so far."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:  # During training the rate is a tensor.
            group["lr"] = float(group["lr"])
        ckpt.save(
            ckpt.checkpoint_path(self.out, self.epoch),
            {
                "config": asdict(self.config),
                "checksum": self.checksum,
                "epoch": self.epoch,
                "history": self.history,
                "losses": self.losses,
                "model": self.model.state_dict(),
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
            },
        )
        # Write the whole file each time, so that a kill never leaves half a line. If a kill comes
        # between the two files, resuming makes them agree again: the checkpoint has the history.
        write_whole(self.out / "metrics.jsonl", jsonl(self.history))


def fit(
    config: Config, resume: dict | None = None, overwrite: bool = False, progress: bool = True
) -> Result:
    """Train, evaluate after every epoch, and write everything into the folder config.out.

    Args:
        config: the flags.
        resume: a checkpoint from checkpoint.load or load_newest; training continues from it.
        overwrite: whether to replace a run that config.out holds.
        progress: whether to show a bar on stderr (if it is a terminal) and a line for each epoch on
            stdout.

    Raises:
        ConfigError: if a flag cannot work on this machine, or contradicts the checkpoint.
        DataError: if data are missing or broken.
        CheckpointError: if the checkpoint does not fit the network.
        OSError: if config.out cannot be written.
    """
    device, dtype = pick_device(config.device), DTYPES[config.dtype]
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError("--cuda-graph: there is no GPU here to replay a graph; leave it out")
    if resume is not None:
        check_same(resume["config"], asdict(config))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    continues = resume is not None and resume["path"].parent.resolve() == out.resolve()
    if not continues and not overwrite and holds_run(out):
        raise ConfigError(
            f"{out} already holds a run: continue it with --resume, replace it with "
            "--overwrite, or choose another --out"
        )
    data = datasets.load(config.dataset, config.data_dir, config.seed, config.limit)
    if config.shift >= min(data.shape[1:]):
        raise ConfigError(
            f"--shift {config.shift} moves images of {data.shape[1]} x "
            f"{data.shape[2]} pixels out of sight"
        )
    mean, std = data.mean_std()
    train = Images(data.train_images, data.train_labels, mean, std, device)
    test = Images(data.test_images, data.test_labels, mean, std, device)
    steps = math.ceil(len(train.labels) / config.batch_size)
    run = _Run(config, data, device)
    if resume is not None:
        run.restore(resume)
    graph = config.cuda_graph
    if graph is None:
        graph = device.type == "cuda" and config.dtype != "float16"

    if not continues:
        clear(out)
    elif (out / "metrics.jsonl").is_file() and (
        (out / "metrics.jsonl").read_bytes() != jsonl(run.history)
    ):
        print(
            f"note: {out / 'metrics.jsonl'} is brought to epoch {run.epoch}, the checkpoint's",
            file=sys.stderr,
        )
    about = describe(run, data, device)
    write_whole(out / "config.json", (json.dumps(about, indent=2) + "\n").encode())
    run.write()
    if progress:
        print(
            f"{config.dataset}: {len(train.labels):,} training and {len(test.labels):,} held-out "
            f"images of {data.shape[1]} x {data.shape[2]}, {len(data.classes)} classes"
        )
        print(
            f"{config.model}: {about['model']['parameters']:,} parameters, {config.dtype}, "
            f"{about['environment']['device']}"
        )
        print(HEADER, *map(epoch_line, run.history), sep="\n", flush=True)

    result = None
    step = TrainStep(
        run.model,
        run.optimizer,
        train.images,
        train.labels,
        mean,
        std,
        config.batch_size,
        dtype,
        config.label_smoothing,
        run.scaler,
        graph,
    )
    with tqdm(
        total=config.epochs * steps,
        initial=run.epoch * steps,
        unit=" step",
        dynamic_ncols=True,
        disable=None if progress else True,
    ) as bar:  # disable=None shows a bar on terminals only.
        for epoch in range(run.epoch + 1, config.epochs + 1):
            bar.set_description(f"epoch {epoch}/{config.epochs}")
            start = time.perf_counter()
            losses, train_loss, train_accuracy = train_epoch(step, config, epoch, bar)
            seconds = time.perf_counter() - start
            result = evaluate(run.model, test, len(data.classes), dtype)
            eval_seconds = time.perf_counter() - start - seconds
            accuracy, precision, recall = scores(result.confusion)
            line = {
                "epoch": epoch,
                "train_loss": train_loss,
                "test_loss": result.loss,
                "train_accuracy": train_accuracy,
                "accuracy": accuracy,
                "precision": precision,
                "recall": recall,
                "seconds": round(seconds, 3),
                "eval_seconds": round(eval_seconds, 3),
                "images_per_second": round(len(train.labels) / seconds, 1),
                "lr": learning_rate(epoch * steps - 1, config.epochs * steps, config.lr),
            }
            if not math.isfinite(train_loss + result.loss):
                raise ConfigError(
                    f"the loss is not finite any more in epoch {epoch} (training {train_loss}, "
                    f"held-out {result.loss}): try a smaller --lr than {config.lr}"
                )
            run.epoch, run.losses = epoch, torch.cat([run.losses, losses])
            run.history.append(line)
            run.write()
            if progress:
                bar.write(epoch_line(line))
                sys.stdout.flush()
    if result is None:  # A finished run was resumed, perhaps for its pictures.
        result = evaluate(run.model, test, len(data.classes), dtype)
    draw(run, data, result)
    if progress:
        print(
            f"written to {out}: {ckpt.checkpoint_path(out, run.epoch).name}, metrics.jsonl, "
            + ", ".join(PICTURES)
        )
    return Result(run.model, run.history, run.losses)


HEADER = (
    "epoch  train loss  test loss  train acc.  accuracy  precision  recall   seconds  "
    "images/s        lr"
)


def epoch_line(line: dict) -> str:
    """Format the metrics of an epoch as a line under HEADER. The seconds are those of training."""
    return (
        "{epoch:5d}  {train_loss:10.4f}  {test_loss:9.4f}  {train_accuracy:10.2%}  "
        "{accuracy:8.2%}  {precision:9.2%}  {recall:6.2%}  {seconds:8.2f}  "
        "{images_per_second:8,.0f}  {lr:8.2g}"
    ).format(**line)


def jsonl(history: list[dict]) -> bytes:
    """Return the content of metrics.jsonl: a line for each epoch."""
    return "".join(json.dumps(line) + "\n" for line in history).encode()


def draw(run: _Run, data, result: Evaluation) -> None:
    """Draw the four pictures, and write them."""
    from . import pictures  # matplotlib takes a second to import, and only this function needs it.

    weight, bias = (value.cpu() for value in list(run.model.state_dict().values())[:2])
    mean, std = data.mean_std()
    example = (data.test_images[len(data.test_images) // 2].float() - mean) / std
    figures = (
        pictures.curves(run.history, run.losses),
        pictures.confusion(result.confusion, data.classes),
        pictures.filters(weight, bias, example),
        pictures.mistakes(data.test_images, data.test_labels, result.probability, data.classes),
    )
    for name, figure in zip(PICTURES, figures, strict=True):
        write_whole(run.out / name, pictures.png(figure))


def describe(run: _Run, data, device: torch.device) -> dict:
    """Return the content of config.json: flags, data, model, machine and versions."""
    import triton

    place = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else (f"CPU with {torch.get_num_threads()} threads")
    )
    return {
        "config": asdict(run.config),
        "data": {
            "train": len(data.train_labels),
            "held_out": len(data.test_labels),
            "shape": list(data.shape),
            "classes": list(data.classes),
            "checksum": f"{run.checksum:08x}",
        },
        "model": {
            "name": run.config.model,
            "parameters": sum(p.numel() for p in run.model.parameters()),
        },
        "environment": {
            "device": place + (", Triton's interpreter" if INTERPRET else ""),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": np.__version__,
        },
    }


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        ConfigError: if the device is not there; if it is the CPU, and Triton was started for a GPU.
    """
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ConfigError("--device cuda: PyTorch sees no GPU here; use --device cpu or auto")
    if name == "cpu" and gpu and not INTERPRET:
        raise ConfigError(
            "--device cpu on a machine with a GPU: set TRITON_INTERPRET=1 in the "
            "environment, so that the kernels are interpreted"
        )
    return torch.device("cuda" if name == "cuda" or (gpu and not INTERPRET) else "cpu")


def clear(out: Path) -> None:
    """Remove the files of an earlier run from its folder, and no other files."""
    for path in (
        *ckpt.find(out),
        *(out / name for name in ("config.json", "metrics.jsonl")),
        *(out / name for name in PICTURES),
    ):
        path.unlink(missing_ok=True)


def holds_run(out: Path) -> bool:
    """Return whether the folder holds a run."""
    return (out / "config.json").exists() or bool(ckpt.find(out))


def default_folder(out: Path, latest: bool) -> Path:
    """Return the last of out, out-2, ... that holds a run if `latest`, else the first free one."""
    free, last = numbered(out, holds_run)
    return (last or out) if latest else free


def run(args: argparse.Namespace) -> int:
    """Train as the command line says. Return 0, or 2 after a user's error, or 130 after Ctrl-C."""
    names = {field.name for field in fields(Config)} | {"resume", "overwrite"}
    given = {name: value for name, value in vars(args).items() if name in names}
    resume, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    state = out = None
    try:
        if "out" not in given and not overwrite and not resume:
            folder = default_folder(Path(Config(**given).out), latest=resume is not None)
            given["out"] = str(folder)
        if resume is not None:
            path = Path(resume or given["out"])
            state = ckpt.load(path) if path.is_file() else ckpt.load_newest(path)
            check_same(state["config"], given)
            given = {**state["config"], "out": str(state["path"].parent), **given}
        config = Config(**given)
        out = Path(config.out)
        fit(config, state, overwrite)
        return 0
    except KeyboardInterrupt:
        saved = ckpt.find(out) if out else []
        print("\nstopped; the last checkpoint is", saved[0] if saved else "none", file=sys.stderr)
        if saved:
            command = f"tilelab train --resume {shlex.quote(str(out))}"
            print("continue with:", command, file=sys.stderr)
        return 130
    except (ConfigError, datasets.DataError, ckpt.CheckpointError) as error:
        reason = str(error)
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        reason = reason or str(error)
    except torch.OutOfMemoryError:
        reason = f"the GPU's memory is too small for --batch-size {config.batch_size}"
    print(f"error: {reason}", file=sys.stderr)
    return 2

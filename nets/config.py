"""The flags of a training run: their meaning, defaults, limits and parser."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .models import MODELS

WARMUP = 0.1  # During this share of all steps the learning rate rises.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# These are --lr, --weight-decay and --momentum when the user does not give them.
RECIPES = {
    "adamw": {"lr": 0.008, "weight_decay": 0.01, "momentum": None},
    "sgd": {"lr": 0.05, "weight_decay": 0.0005, "momentum": 0.9},
}
# These flags may differ between a run and its continuation, since they do not change what is
# computed. A folder of data may have moved: a checksum shows that the data are the same.
MAY_DIFFER = ("dataset", "data_dir", "device", "out", "cuda_graph")


class ConfigError(ValueError):
    """A flag has a wrong value or contradicts another flag. The message is one line."""


@dataclass(frozen=True)
class Config:
    """All flags of a run. A flag that is None gets the default that fits the other flags.

    Attributes:
        dataset: a name or a folder; see data.load.
        data_dir: the folder for downloads; None is the user's cache folder.
        model: one of models.MODELS.
        epochs: the number of passes over the training images.
        batch_size: the number of images in a step; the last step of an epoch may have fewer.
        optimizer: "adamw" or "sgd" (with Nesterov momentum).
        lr: the highest learning rate, which the run reaches at the end of the warm-up.
        weight_decay: decoupled from the gradient for adamw; an L2 penalty for sgd.
        momentum: the momentum of sgd.
        label_smoothing: from 0 to 1; it is in the training loss only.
        shift: the largest move of a training image, in pixels.
        limit: the largest number of training images, and of held-out images.
        seed: the seed of the initial weights, of the split of mnist5k, of the images' order and of
            their moves.
        device: "auto", "cpu" or "cuda".
        dtype: "float32", or "float16" or "bfloat16" for mixed precision. In mixed precision the
            parameters, the loss and the optimizer stay in float32. With float16 the loss is scaled,
            so that small gradients do not become 0.
        out: the run's folder.
        cuda_graph: whether each step is replayed from a CUDA graph (step.py explains what that is).
            None means: on a GPU, except for float16. The losses are the same with and without.

    Raises:
        ConfigError: if a value is out of range or contradicts another.
    """

    dataset: str = "mnist5k"
    data_dir: str | None = None
    model: str = "cnn"
    epochs: int = 3
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    label_smoothing: float = 0.0
    shift: int = 1
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    out: str | None = None
    cuda_graph: bool | None = None

    def __post_init__(self):
        """Fill in the defaults that depend on other flags, and check every value."""
        for name, choices in (
            ("model", MODELS),
            ("optimizer", RECIPES),
            ("dtype", DTYPES),
            ("device", ("auto", "cpu", "cuda")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"--{name} must be one of {', '.join(choices)}; got {value!r}")
        if self.momentum is not None and self.optimizer != "sgd":
            raise ConfigError(f"--momentum belongs to --optimizer sgd, not {self.optimizer}")
        for name, value in RECIPES[self.optimizer].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # This works although the class is frozen.
        if self.cuda_graph and self.dtype == "float16":
            raise ConfigError(
                "--cuda-graph does not go with --dtype float16, whose scaled gradients make the "
                "host decide which steps are skipped; use bfloat16"
            )
        if self.out is None:
            name = Path(self.dataset).resolve().name
            object.__setattr__(self, "out", f"runs/{name}-{self.model}-seed{self.seed}")
        for name, low, high in (
            ("epochs", 1, 9999),
            ("batch_size", 1, 2**31 - 1),
            ("shift", 0, 2**31 - 1),
            ("limit", 1, 2**63 - 1),
            ("seed", 0, 2**63 - 1),
            ("lr", 0.0, 1e6),
            ("weight_decay", 0.0, 1e6),
            ("momentum", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{_flag(name)} must be from {low} to {high}, got {value}")


def check_same(stored: dict, given: dict) -> None:
    """Check that the given flags do not contradict the flags stored in a checkpoint.

    Raises:
        ConfigError: if they do. The message names the first difference.
    """
    for name, value in given.items():
        if name not in MAY_DIFFER and value != stored.get(name):
            raise ConfigError(
                f"{_flag(name)} {value} contradicts the checkpoint, which was "
                f"trained with {_flag(name)} {stored.get(name)}"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run to a parser. A flag that the user omits is absent from the result."""
    parser.argument_default = argparse.SUPPRESS
    default = {field.name: field.default for field in fields(Config)}
    recipe = {  # This says in words which defaults depend on the optimizer.
        name: " and ".join(
            f"{values[name]} for {optimizer}" for optimizer, values in RECIPES.items()
        )
        for name in ("lr", "weight_decay")
    }
    parser.description = (
        "Train a network by Triton kernels on images of digits, clothes, ... "
        "With no flags: the demo, 3 epochs on 4,000 MNIST digits."
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        metavar="NAME|FOLDER",
        help="mnist5k (comes with the package), mnist or fashion-mnist (downloaded), "
        "or a folder with files in MNIST's format (default: mnist5k)",
    )
    data.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="where downloads are kept (default: the user's cache folder)",
    )
    data.add_argument(
        "--shift",
        type=int,
        metavar="PIXELS",
        help=f"move training images by up to this much (default: {default['shift']})",
    )
    data.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use at most N training and N held-out images (default: all)",
    )
    train = parser.add_argument_group("training")
    train.add_argument(
        "--model",
        choices=MODELS,
        help="cnn: fused kernels; cnn-unfused, cnn-im2col: the same network of separate kernels; "
        "cnn-torch: of PyTorch's own, to compare; mlp: two matmuls; vgg16: for a GPU, and images "
        f"of at least 32 x 32, which MNIST's are not (default: {default['model']})",
    )
    train.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"passes over the training images (default: {default['epochs']})",
    )
    train.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images a step (default: {default['batch_size']})",
    )
    train.add_argument("--optimizer", choices=RECIPES, help=f"(default: {default['optimizer']})")
    train.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="highest learning rate, after a warm-up of "
        f"{WARMUP:.0%} of the steps; then it falls to 0 (default: {recipe['lr']})".replace(
            "%", "%%"
        ),
    )
    train.add_argument(
        "--weight-decay", type=float, metavar="RATE", help=f"(default: {recipe['weight_decay']})"
    )
    train.add_argument(
        "--momentum",
        type=float,
        metavar="M",
        help=f"of sgd, which is Nesterov's (default: {RECIPES['sgd']['momentum']})",
    )
    train.add_argument(
        "--label-smoothing",
        type=float,
        metavar="0..1",
        help=f"in the training loss (default: {default['label_smoothing']:g})",
    )
    train.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"of weights, split, order and shifts (default: {default['seed']})",
    )
    train.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="auto is the GPU if there is one; on the CPU the kernels run in "
        f"Triton's interpreter (default: {default['device']})",
    )
    train.add_argument(
        "--dtype",
        choices=DTYPES,
        help="float16 and bfloat16 are mixed precision: "
        f"parameters stay in float32 (default: {default['dtype']})",
    )
    train.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="replay each step from a CUDA graph, with the same losses, or launch its kernels one "
        "by one (default: a graph on a GPU, but for float16)",
    )
    run = parser.add_argument_group("the run's folder")
    run.add_argument(
        "--out",
        metavar="FOLDER",
        help="where metrics, checkpoints and pictures go (default: runs/DATASET-MODEL-seedSEED, "
        "with -2, -3, ... behind it where that holds a run)",
    )
    again = run.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue from a run's folder, or from one of its checkpoints "
        "(default: the newest good checkpoint in --out, or in the last of its default folders)",
    )
    again.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")

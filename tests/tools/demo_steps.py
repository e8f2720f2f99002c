"""The first steps of `tilelab train`, with all that they computed: to compare two ways to run them.

`python -m tests.tools.demo_steps FILE DTYPE...` takes them wherever kernels run in that process,
and writes them to a file for torch.load.
"""

import sys
from typing import NamedTuple

import torch

from tilelab.kernels import AdamW
from tilelab.nets import data, models
from tilelab.nets.config import Config
from tilelab.nets.step import TrainStep

STEPS, BATCH = 3, 4
RATE, DECAY = Config().lr, Config().weight_decay


class Step(NamedTuple):
    """What one step computed.

    Attributes:
        loss: float32 [], the mean of the batch.
        gradients: of each parameter, by its name; in bfloat16 of its copy.
        parameters: after the step, by their names.
    """

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def make(dtype: torch.dtype, batch: int = BATCH) -> TrainStep:
    """The demo's network and optimizer before their first step, on real digits."""
    digits = data.load("mnist5k", limit=STEPS * batch)
    torch.manual_seed(0)
    model = models.build("cnn", digits.shape, len(digits.classes))
    optimizer = AdamW(model.parameters(), RATE, weight_decay=DECAY, capturable=True)
    images = digits.train_images, digits.train_labels
    step = TrainStep(model, optimizer, *images, *digits.mean_std(), batch, dtype)
    order, moves = data.epoch_order(STEPS * batch, seed=0, epoch=1, shift=1)
    step.begin(order, moves, torch.full((STEPS,), RATE))
    return step


def take(step: TrainStep) -> list[Step]:
    """Take the steps."""
    taken = []
    for i in range(STEPS):
        step.step()
        own = dict(step.model.named_parameters())
        used = step.copies or own  # bfloat16: the network runs on copies, which have the gradients
        taken.append(Step(
            step.losses[i].clone(),
            {name: p.grad.clone() for name, p in used.items()},
            {name: p.detach().clone() for name, p in own.items()},
        ))  # fmt: skip
    return taken


if __name__ == "__main__":
    file, *names = sys.argv[1:]
    steps = {name: take(make(getattr(torch, name))) for name in names}
    torch.save({name: [tuple(s) for s in taken] for name, taken in steps.items()}, file)

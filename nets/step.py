"""A whole training step in few launches, and on a GPU in one CUDA graph.

    part         what it does                                                             launches
    batch        gather, shift and standardise the images; get the labels and the
                 learning rate                                                            1
    forward      run the model's layers                                                   (model's)
    loss         compute the loss of each image, and its gradient                         2
    backward     run the model's layers backward                                          (model's)
    optimizer    update all parameters, their state and their 16-bit copies               1
    record       write the loss, count the right answers, go on to the next step          1

What limits it: Python. A step of the demo has about 15 launches. The GPU is predicted to need a few
microseconds for each, but a call from Python takes the host more than 20 microseconds (measured:
perf/results/cpu/doctor.json).

A CUDA graph removes this limit: it is a recording of launches that the GPU can run again (a
replay). `Graph` makes one in two passes over the same Python code:

1. The first step runs as usual, on a stream of its own. It compiles the kernels and allocates
   memory.
2. The same code runs again while torch captures its launches. The GPU does none of this work.

From then on, Python asks for one replay in each step.

A replay has the same arguments each time. So everything that changes from step to step lies on the
GPU. `batch_kernel` uses the number of the step to find its images and the learning rate.
`record_kernel` advances this number. From the first step of an epoch to the last, the host copies
nothing and waits for nothing. If the last batch of an epoch is smaller, it has a graph of its own.

Mixed precision: in bfloat16 the network runs on copies of its float32 parameters. The optimizer
writes them in its one launch (kernels/optim.py), so nothing is cast. In float16 the gradients have
to be scaled, and the host decides which steps to skip. So float16 uses autocast and no graph.

Read first: kernels/optim.py. Sources: Micikevicius et al., Mixed Precision Training (2018); the
documentation of torch.cuda.graph.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from tilelab.kernels import cross_entropy
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.optim import capture

# 512 pixels a program: 64 digits of 28 x 28 pixels still make 98 programs. A warp is 32 threads.
BATCH_TILE = dict(BLOCK_M=512, num_warps=4)
RECORD_ELEMENTS = 4096  # record_kernel reads this many logits at a time, with eight warps.


@triton.jit
def batch_kernel(
    images_ptr, labels_ptr, order_ptr, moves_ptr, rates_ptr, step_ptr, x_ptr, y_ptr, lr_ptr,
    BATCH, N, H, W, mean, std, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels of x, the standardised images [N, H, W], and some of y.

    With row = i * BATCH + n, image n of step i is image order[row], moved by moves[row].
    """
    step = tl.load(step_ptr)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs = first + tl.arange(0, BLOCK_M)
    # A 64-bit division costs many instructions. The program divides `first` once, and its pixels
    # divide in 32 bits. They count from the first pixel of the image that `first` is in.
    pixel = (first % (H * W)).to(tl.int32) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = first // (H * W) + pixel // (H * W)
    mask = n < N
    row = step * BATCH + n  # the place in the epoch's order
    h, w = pixel // W % H, pixel % W
    h -= tl.load(moves_ptr + 2 * row, mask=mask, other=0)
    w -= tl.load(moves_ptr + 2 * row + 1, mask=mask, other=0)
    image = tl.load(order_ptr + row, mask=mask, other=0)
    inside = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    # Where the move leaves a gap, the mask fills it with 0.
    x = tl.load(images_ptr + (image * H + h) * W + w, mask=inside, other=0)
    x = (x.to(tl.float32) - mean) / std
    tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)

    # The first programs write the N labels too.
    image = tl.load(order_ptr + step * BATCH + offs, mask=offs < N, other=0)
    y = tl.load(labels_ptr + image, mask=offs < N, other=0)
    tl.store(y_ptr + offs, y, mask=offs < N)
    if tl.program_id(0) == 0:
        tl.store(lr_ptr, tl.load(rates_ptr + step))


@triton.jit
def record_kernel(
    logits_ptr, y_ptr, loss_ptr, losses_ptr, right_ptr, step_ptr, N, C, stride_n, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes the mean of a step's N losses, and counts the right answers.

    It is the only program. So the order of each sum is fixed, and only one program writes the
    number of the step.
    """
    offs_n = tl.arange(0, BLOCK_N)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    right = tl.full((BLOCK_M,), 0, tl.int64)
    for m in range(0, N, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = offs_m < N
        total += tl.load(loss_ptr + offs_m, mask=mask, other=0.0)
        offs = (offs_m * stride_n)[:, None] + (offs_n * stride_c)[None, :]
        inside = mask[:, None] & (offs_n < C)[None, :]
        x = tl.load(logits_ptr + offs, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(y_ptr + offs_m, mask=mask, other=-1)
        right += (tl.argmax(x, axis=1) == y).to(tl.int64)
    step = tl.load(step_ptr)
    right_so_far = tl.load(right_ptr)
    tl.debug_barrier()  # All threads have read both numbers before one of them writes.
    tl.store(losses_ptr + step, tl.sum(total, axis=0) / N)
    tl.store(right_ptr, right_so_far + tl.sum(right, axis=0))
    tl.store(step_ptr, step + 1)


class Graph:
    """A function without arguments, which a GPU can replay from a CUDA graph after the first call.

    Args:
        work: the function. Each call must launch the same kernels on the same memory. Its result
            is the result of every call: a replay returns the same tensors, with new values.
        stream: the first call runs on this stream and is captured there. If it is None there is no
            graph, and each call runs `work`.
        pool: memory that several Graphs share (torch.cuda.graph_pool_handle). They must not run at
            the same time, and must have the same stream to share memory that they have freed.
    """

    def __init__(self, work: Callable[[], object], stream: torch.cuda.Stream | None, pool=None):
        self.work, self.stream, self.pool, self.graph = work, stream, pool, None

    def __call__(self) -> object:
        """Do the work once: replay it, or run it and capture it."""
        if self.stream is None:
            return self.work()
        if self.graph is not None:
            self.graph.replay()
            return self.result
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            result = self.work()  # This call computes its step.
        outer.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=self.stream, pool=self.pool):
            self.result = self.work()  # This call only records the launches.
        self.graph = graph
        return result


def copies_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Make bfloat16 copies of the model's parameters, by name. The optimizer keeps them current."""
    copies = optimizer.make_copies(torch.bfloat16)
    return {name: copies[p] for name, p in model.named_parameters()}


def weights(size: int, device: torch.device) -> Tensor:
    """Return the weight of each of `size` losses in their mean: 1 / size, as a view [size]."""
    return torch.full((), 1 / size, device=device).expand(size)


def learn(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    copies: dict[str, Tensor],
    dtype: torch.dtype,
    label_smoothing: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward pass, the backward pass and the optimizer.

    The gradient needs no sum of the losses: the backward pass begins at the loss of each image,
    with the image's weight as its gradient.

    Args:
        model: computes logits [N, classes].
        optimizer: updates the model's parameters.
        x: [N, 1, H, W], the images.
        y: int64 [N], the labels.
        weight: float32 [N], from `weights`.
        copies: the parameters to compute with, from `copies_of`. If it is empty, the model computes
            with its own.
        dtype: the dtype to compute in.
        label_smoothing: the label smoothing of the loss.
        scaler: scales the loss in float16.

    Returns:
        The logits [N, classes], and the loss of each image [N].
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        logits = functional_call(model, copies, (x,)) if copies else model(x)
        losses = cross_entropy(logits, y, label_smoothing=label_smoothing, reduction="none")
    optimizer.zero_grad()
    if scaler is None:
        losses.backward(weight)
        optimizer.step()
    else:
        scaler.scale(losses).backward(weight)
        scaler.step(optimizer)
        scaler.update()
    return logits.detach(), losses.detach()


class TrainStep:
    """The steps of an epoch over images on a device: call `begin`, then `step` for each batch.

    Args:
        model: computes logits [N, classes] of images [N, 1, H, W]. Its parameters are float32.
        optimizer: one of ours or of torch.optim, for the model's parameters. Its learning rate
            becomes a tensor on the device.
        images: uint8 [count, H, W].
        labels: int64 [count].
        mean, std: the mean and the standard deviation of the pixels, from 0 to 255.
        batch_size: the number of images in a step; the last step of an epoch may have fewer.
        dtype: the dtype to compute in. bfloat16 needs one of our optimizers.
        label_smoothing: the label smoothing of the loss.
        scaler: scales the loss in float16.
        graph: whether to capture the steps in CUDA graphs.

    Attributes:
        losses: float32 [steps], the losses of the epoch's steps so far, and 0 for the others.
        right: int64 [], the number of right answers in the epoch so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        images: Tensor,
        labels: Tensor,
        mean: float,
        std: float,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        label_smoothing: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        graph: bool = False,
    ):
        device, count = labels.device, len(labels)
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.batch_size, self.label_smoothing = batch_size, label_smoothing
        self.scaler = scaler
        self.copies = copies_of(model, optimizer) if dtype == torch.bfloat16 else {}

        # These tensors hold everything that changes from step to step.
        self.order = torch.zeros(count, dtype=torch.int64, device=device)
        self.moves = torch.zeros(count, 2, dtype=torch.int64, device=device)
        self.rates = torch.zeros(cdiv(count, batch_size), device=device)
        self.losses = torch.zeros_like(self.rates)
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr

        self.sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
        self.steps: dict[int, Graph] = {}
        stream, pool = None, None
        if graph:
            stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        for size in sorted(set(self.sizes), reverse=True):
            x, y = self.input(size), torch.zeros(size, dtype=torch.int64, device=device)
            self.steps[size] = Graph(self._work(x, y, weights(size, device)), stream, pool)

    def input(self, size: int) -> Tensor:
        """Return memory for a batch of `size` images, [size, 1, H, W] in channels_last."""
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        shape = size, 1, *self.images.shape[1:]
        x = torch.empty(shape, dtype=dtype, device=self.images.device)
        return x.to(memory_format=torch.channels_last)

    def begin(self, order: Tensor, moves: Tensor, rates: Tensor) -> None:
        """Begin an epoch.

        Args:
            order: int64 [count], the order of the images.
            moves: int64 [count, 2], how far each one moves down and right, in pixels.
            rates: float32 [steps], the learning rate of each step.
        """
        for mine, new in ((self.order, order), (self.moves, moves), (self.rates, rates)):
            mine.copy_(new)
        self.taken = 0
        for x in (self.number, self.right, self.losses):
            x.zero_()

    def step(self) -> int:
        """Take the next step of the epoch without waiting for it. Return its number of images."""
        size = self.sizes[self.taken]
        self.steps[size]()
        self.taken += 1
        return size

    def _work(self, x: Tensor, y: Tensor, weight: Tensor) -> Callable[[], None]:
        """Return the function that takes a whole step, for batches of the size of x."""
        N, _, H, W = x.shape

        def work() -> None:
            tile = choose_tile("batch", x, {2: BATCH_TILE, 4: BATCH_TILE}, M=x.numel())
            launch(
                batch_kernel, (cdiv(x.numel(), tile["BLOCK_M"]),),
                self.images, self.labels, self.order, self.moves, self.rates, self.number,
                x, y, self.lr, self.batch_size, N, H, W, self.mean, self.std, **tile,
            )  # fmt: skip
            logits, losses = learn(
                self.model, self.optimizer, x, y, weight, self.copies, self.dtype,
                self.label_smoothing, self.scaler,
            )  # fmt: skip
            columns = triton.next_power_of_2(logits.shape[1])
            rows = min(max(1, RECORD_ELEMENTS // columns), triton.next_power_of_2(N))
            launch(
                record_kernel, (1,), logits, y, losses, self.losses, self.right, self.number,
                N, *logits.shape[1:], *logits.stride(), BLOCK_M=rows, BLOCK_N=columns, num_warps=8,
            )  # fmt: skip

        return work

"""A whole training step in few launches, and on a GPU in one CUDA graph.

    batch            gather, shift and standardise the images; the labels; the learning rate    1
    forward          the model's layers
    loss             of each image, and its gradient                                            2
    backward         the model's layers
    optimizer        all parameters, their state and their 16-bit copies                        1
    record           the step's loss, the right answers so far, and on to the next step         1

A step of a small network takes a GPU less time than it takes Python to launch it: some 16 kernels
of a few microseconds each, beside 10 to 50 microseconds of the host for each. A CUDA graph is the
way out. A step runs once as it is, on a stream of its own, and so everything is compiled and
allocated; then the same Python runs again while torch captures what it launches, and does none of
it. From then on a step is one replay, which Python only asks for.

A replay has the same arguments each time, and so everything that changes from step to step lies on
the GPU: `batch_kernel` finds its images and the learning rate by the number of the step, which
`record_kernel` advances. Nothing is copied, and nobody waits, from the epoch's first step to its
last. The last batch of an epoch may be smaller, and then has a graph of its own.

Mixed precision. In bfloat16 the network runs on copies of its float32 parameters, which the
optimizer writes in its one launch (kernels/optim.py), so nothing is cast. In float16 the gradients
have to be scaled, and whether a step is to be skipped the host decides: so it runs under autocast,
without a graph.

Read first: kernels/optim.py. Source: Micikevicius et al., Mixed Precision Training (2018); CUDA
graphs, as torch.cuda.graph has them.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from tilelab.kernels import cross_entropy
from tilelab.kernels._launch import launch
from tilelab.kernels._tiles import cdiv, choose_tile
from tilelab.kernels.optim import capture
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

BATCH_TILE = dict(BLOCK_M=512, num_warps=4)  # pixels: enough programs for 64 digits, too
RECORD_ELEMENTS = 4096  # logits at a time, by eight warps


@triton.jit
def batch_kernel(
    images_ptr, labels_ptr, order_ptr, moves_ptr, rates_ptr, step_ptr, x_ptr, y_ptr, lr_ptr,
    BATCH, N, H, W, mean, std, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_M pixels of x, [N, H, W] standardised images, and its part of y.

    Image n of step i is number order[i * BATCH + n] of all, moved down and right by moves.
    """
    step = tl.load(step_ptr)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs = first + tl.arange(0, BLOCK_M)
    # Divisions of 64 bits are a hundred instructions: one for the program, none for its pixels.
    pixel = (first % (H * W)).to(tl.int32) + tl.arange(0, BLOCK_M)  # from its first image on
    n = first // (H * W) + pixel // (H * W)
    mask = n < N
    row = step * BATCH + n
    h, w = pixel // W % H, pixel % W
    h -= tl.load(moves_ptr + 2 * row, mask=mask, other=0)
    w -= tl.load(moves_ptr + 2 * row + 1, mask=mask, other=0)
    image = tl.load(order_ptr + row, mask=mask, other=0)
    inside = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = tl.load(images_ptr + (image * H + h) * W + w, mask=inside, other=0)  # 0 comes in behind
    x = (x.to(tl.float32) - mean) / std
    tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)

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
    """One program records a step: the mean of its N losses, and how often the label is largest.

    It is the only one, so that sums have one order, and the number of the step one writer.
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
    tl.store(losses_ptr + step, tl.sum(total, axis=0) / N)
    tl.store(right_ptr, tl.load(right_ptr) + tl.sum(right, axis=0))
    tl.store(step_ptr, step + 1)


class Graph:
    """Work of no arguments, which on a GPU is captured in a CUDA graph when it has run once.

    Args:
        work: launches the same, on the same memory, each time. What it returns is returned by every
            call: after a replay the same tensors, with new values.
        stream: where the first call runs, and is captured. None: no graph, each call runs the work.
        pool: memory (torch.cuda.graph_pool_handle) of several Graphs, which must not run side by
            side. Only those of one stream share what they have freed.
    """

    def __init__(self, work: Callable[[], object], stream: torch.cuda.Stream | None, pool=None):
        self.work, self.stream, self.pool, self.graph = work, stream, pool, None

    def __call__(self) -> object:
        """Do the work once."""
        if self.stream is None:
            return self.work()
        if self.graph is not None:
            self.graph.replay()
            return self.result
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            result = self.work()  # a step like any other
        outer.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=self.stream, pool=self.pool):
            self.result = self.work()  # which only takes down what is launched
        self.graph = graph
        return result


def copies_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Make bfloat16 copies of the model's parameters, by name, which the optimizer keeps up."""
    copies = optimizer.make_copies(torch.bfloat16)
    return {name: copies[p] for name, p in model.named_parameters()}


def weights(size: int, device: torch.device) -> Tensor:
    """Return what each of `size` losses counts in their mean: one number, seen `size` times."""
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
    """Forward, backward and the optimizer.

    Losses are not added up for the gradient: it is that of each image's, times its weight.

    Args:
        model: computes logits [N, classes].
        optimizer: over its parameters.
        x: the images.
        y: int64 [N], the labels.
        weight: float32 [N], of `weights`.
        copies: of `copies_of`, to compute with; empty for the parameters themselves.
        dtype: to compute in.
        label_smoothing: of the loss.
        scaler: of the loss, in float16.

    Returns:
        The logits, and the loss of each image.
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
    """The steps of an epoch over images that lie on a device: `begin`, then `step` again and again.

    Args:
        model: computes logits [N, classes] of images [N, 1, H, W]. Its parameters are float32.
        optimizer: one of ours, or of torch.optim, over the model's parameters. Its learning rate
            becomes a tensor on the device.
        images: uint8 [count, H, W].
        labels: int64 [count].
        mean, std: of pixels, to standardise by.
        batch_size: images of a step; the epoch's last may have fewer.
        dtype: to compute in. bfloat16 needs one of our optimizers.
        label_smoothing: of the loss.
        scaler: of the loss, in float16.
        graph: capture the steps in CUDA graphs.

    Attributes:
        losses: float32 [steps], of the epoch's steps so far.
        right: int64 [], right answers in the epoch so far.
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

        # All that changes from step to step.
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
        """Return an empty batch."""
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        shape = size, 1, *self.images.shape[1:]
        x = torch.empty(shape, dtype=dtype, device=self.images.device)
        return x.to(memory_format=torch.channels_last)

    def begin(self, order: Tensor, moves: Tensor, rates: Tensor) -> None:
        """Begin an epoch: its images [count], their moves [count, 2], a learning rate a step."""
        for mine, new in ((self.order, order), (self.moves, moves), (self.rates, rates)):
            mine.copy_(new)
        self.taken = 0
        for x in (self.number, self.right, self.losses):
            x.zero_()

    def step(self) -> int:
        """Take the next step of the epoch, and return how many images it had; nobody waits."""
        size = self.sizes[self.taken]
        self.steps[size]()
        self.taken += 1
        return size

    def _work(self, x: Tensor, y: Tensor, weight: Tensor) -> Callable[[], None]:
        """The whole step, for a batch of as many images as x."""
        N, _, H, W = x.shape

        def work() -> None:
            tile = choose_tile("batch", x.dtype, {2: BATCH_TILE, 4: BATCH_TILE}, M=x.numel())
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

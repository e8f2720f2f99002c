"""The whole training step: its batches, its records, its copies, and its CUDA graph."""

import contextlib
import copy

import pytest
import torch

from tests.tools.inputs import DEVICE
from tilelab.kernels import SGD, AdamW, cross_entropy
from tilelab.nets import data, step
from tilelab.nets.models import build
from tilelab.nets.step import TrainStep

MEAN, STD = 33.0, 78.0
COUNT, BATCH = 23, 8  # two whole batches, and one of 7


def images(height=12, width=15):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (COUNT, height, width), dtype=torch.uint8, generator=generator)
    return x.to(DEVICE), torch.randint(0, 4, (COUNT,), generator=generator).to(DEVICE)


def make(name="mlp", optimizer=AdamW, **options):
    torch.manual_seed(0)
    model = build(name, (1, 12, 15), 4).to(DEVICE)
    flags = dict(capturable=True) if optimizer is AdamW else dict(momentum=0.9, nesterov=True)
    optimizer = optimizer(model.parameters(), **flags)
    return TrainStep(model, optimizer, *images(), MEAN, STD, BATCH, **options)


def epoch(train_step, number=1, shift=2, rate=0.01):
    order, moves = data.epoch_order(COUNT, seed=3, epoch=number, shift=shift)
    rates = torch.tensor([rate * (i + 1) for i in range(len(train_step.sizes))])
    train_step.begin(order, moves, rates)
    return [train_step.step() for _ in rates]


@pytest.mark.core
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_those_of_plain_torch(dtype, shift, monkeypatch):
    seen = []

    def learn(model, optimizer, x, y, weight, *rest):
        seen.append((x.clone(), y.clone(), weight, optimizer.param_groups[0]["lr"].item()))
        return torch.zeros(len(x), 4, device=DEVICE), torch.zeros(len(x), device=DEVICE)

    monkeypatch.setattr(step, "learn", learn)
    train_step = make(dtype=dtype)
    for number in (1, 2):
        assert epoch(train_step, number, shift) == [8, 8, 7]
        want = data.batches(*images(), BATCH, seed=3, epoch=number, shift=shift)
        for i, (pixels, labels) in enumerate(want):
            x, y, weight, rate = seen.pop(0)
            assert x.shape == (len(labels), 1, 12, 15) and x.dtype == dtype
            standardised = ((pixels.float() - MEAN) / STD).to(dtype)[:, None]
            tolerance = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(x, standardised, rtol=tolerance, atol=tolerance)
            assert torch.equal(y, labels) and x.is_contiguous(memory_format=torch.channels_last)
            assert weight.sum().item() == pytest.approx(1) and len(weight) == len(labels)
            assert rate == pytest.approx(0.01 * (i + 1))
    assert not seen


@pytest.mark.core
@pytest.mark.parametrize("classes", [1, 4, 10, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_recorded(dtype, classes, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    made = []

    def learn(model, optimizer, x, y, *rest):
        logits = torch.randn(len(x), classes, generator=generator).to(DEVICE, dtype)
        made.append((logits, y.clone(), torch.rand(len(x), generator=generator).to(DEVICE)))
        return logits, made[-1][2]

    monkeypatch.setattr(step, "learn", learn)
    train_step = make(dtype=dtype)
    for number in (1, 2):  # the second epoch begins from nothing
        made.clear()
        epoch(train_step, number)
        losses = torch.stack([loss.mean() for _, _, loss in made])
        torch.testing.assert_close(train_step.losses, losses)
        right = sum((logits.argmax(1) == y).sum() for logits, y, _ in made)
        assert train_step.right == right and train_step.number == 3
        assert classes > 10 or right > 0


@pytest.mark.core
@pytest.mark.parametrize("name, optimizer", [("cnn", AdamW), ("cnn-unfused", SGD), ("mlp", SGD)])
def test_copies_give_the_losses_of_autocast(name, optimizer):
    """bfloat16, bit for bit: weights are rounded in the optimizer as autocast rounds them."""
    train_step = make(name, optimizer, dtype=torch.bfloat16, label_smoothing=0.1)
    twin = copy.deepcopy(train_step.model)
    flags = dict(capturable=True) if optimizer is AdamW else dict(momentum=0.9, nesterov=True)
    rate = torch.zeros((), device=DEVICE)
    other = optimizer(twin.parameters(), **flags | dict(lr=rate))
    for number in (1, 2):
        losses = []
        batches = data.batches(*images(), BATCH, seed=3, epoch=number, shift=2)
        for i, (pixels, labels) in enumerate(batches):
            x = ((pixels.float() - MEAN) / STD)[:, None].to(memory_format=torch.channels_last)
            rate.fill_(0.01 * (i + 1))
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = twin(x)
            loss = cross_entropy(logits.float(), labels, label_smoothing=0.1)
            other.zero_grad()
            loss.backward()
            other.step()
            losses.append(loss.item())
        epoch(train_step, number)
        assert train_step.losses.tolist() == pytest.approx(losses, rel=1e-6)
    if DEVICE == "cpu":  # a GPU's division may be another in the batch
        for p, q in zip(train_step.model.parameters(), twin.parameters(), strict=True):
            assert p.dtype == torch.float32 and torch.equal(p, q)
    for mine in train_step.copies.values():
        assert mine.grad.dtype == mine.dtype == torch.bfloat16


class Tape:
    """A CUDA graph for a machine without one: a capture changes nothing, a replay does the work."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.work()


@pytest.fixture
def tapes(monkeypatch):
    """TrainSteps with graph=True get Tapes, which this lists, with the pools they asked for."""
    made = []

    def watch(train_step):
        @contextlib.contextmanager
        def capture(graph, stream, pool):
            assert all(g.stream is stream for g in train_step.steps.values())
            owner = next(g for g in train_step.steps.values() if g.graph is None)
            state = train_step.optimizer.state.values()
            tensors = [*train_step.model.parameters(), *train_step.copies.values()]
            tensors += [x for s in state for x in s.values()]
            tensors += [getattr(train_step, x) for x in ("number", "losses", "right", "lr")]
            before = [x.detach().clone() for x in tensors]
            train_step.number.zero_()  # this capture does run, and there may be no next batch
            yield
            with torch.no_grad():
                for x, old in zip(tensors, before, strict=True):
                    x.copy_(old)
            graph.work = owner.work
            made.append((graph, pool))

        monkeypatch.setattr(step, "capture", capture)
        return train_step

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "shared")
    watch.made = made
    return watch


@pytest.mark.core
@pytest.mark.skipif(DEVICE == "cuda", reason="there the real thing is tested")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_is_the_same_step(tapes, dtype):
    """A graph for each size of batch, captured when that has run once, and replayed ever after."""
    plain, captured = make(dtype=dtype), tapes(make(dtype=dtype, graph=True))
    for number in (1, 2, 3):
        assert epoch(plain, number) == epoch(captured, number)
        assert torch.equal(plain.losses, captured.losses) and plain.losses.all()
        assert plain.right == captured.right
    for p, q in zip(plain.model.parameters(), captured.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [(tape.replays, pool) for tape, pool in tapes.made] == [(5, "shared"), (2, "shared")]


def test_a_step_of_torchs_network_and_a_scaled_one():
    """float16 under a GradScaler, without copies; cnn-torch has nothing of ours but the step."""
    for options in (
        dict(name="cnn-torch", dtype=torch.bfloat16),
        dict(dtype=torch.float16, scaler=torch.amp.GradScaler(DEVICE)),
    ):
        train_step = make(**options)
        first = [epoch(train_step, 1), train_step.losses.mean()][1]
        for number in range(2, 6):
            epoch(train_step, number)
        assert train_step.losses.mean() < first
        assert bool(train_step.copies) == (options["dtype"] == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [AdamW, SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cnn", "cnn-unfused", "mlp"])
def test_a_cuda_graph_gives_the_same_bits_and_waits_for_nobody(name, dtype, optimizer):
    losses = {}
    for graph in (False, True):
        train_step = make(name, optimizer, dtype=dtype, graph=graph)
        losses[graph] = []
        for number in range(1, 5):
            order, moves = data.epoch_order(COUNT, seed=3, epoch=number, shift=2)
            train_step.begin(order, moves, torch.full((3,), 0.01))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
            try:
                for _ in train_step.sizes:
                    train_step.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses[graph] += train_step.losses.tolist() + [train_step.right.item()]
        losses[graph] += [p.detach().clone() for p in train_step.model.parameters()]
    for a, b in zip(*losses.values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))

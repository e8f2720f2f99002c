"""Work that is not a function of tensors: an optimizer's step, and training steps.

Each function is the `prepare` of an operator's row. It gets the workload, who is to do it, the
device and a Maker of inputs. It returns the call, and the inputs that the call must not change.
"""

import torch
import torch.nn.functional as F

from tilelab import kernels
from tilelab.perf.work.formulas import Maker
from tilelab.perf.work.peers import as_peer

IN_A_GRAPH = ("tilelab", "graph", "compile")  # of a training step on a GPU


def optimizer(w, impl, device, make, name, **options):
    """One step over `tensors` parameters of `elements` each; the results are the parameters."""
    s = w.shape
    params, grads = ([make(s["elements"]) for _ in range(s["tensors"])] for _ in range(2))
    if impl == "reference":
        params, grads = ([x.double() for x in xs] for xs in (params, grads))
    for p, grad in zip(params, grads, strict=True):
        p.requires_grad_().grad = grad
    if impl == "torch":
        options["fused"] = params[0].is_cuda  # its fastest, where it has one
    made = getattr(kernels if impl == "tilelab" else torch.optim, name)(params, **options)
    step = as_peer(impl, made.step)

    def call():
        _refuse_capture(params[0])
        step()
        return tuple(p.detach() for p in params)

    return call, grads


def training_step(w, impl, device, make):
    """A step of the demo network: forward, backward, AdamW; results: loss and gradients.

    Ours as nets/step.py has it: with 16-bit copies of the parameters, in one CUDA graph. "torch" is
    what a user writes, "graph" and "compile" are in a graph too, and their AdamW is fused.
    """
    from tilelab.nets import models, step  # only whole steps need the networks

    make_images = Maker(w.torch_dtype, device, None if make.generator is None else 1)
    images, labels = make_images(w.shape["N"], 1, 28, 28), make.classes(w.shape["N"], 10)
    ours = impl == "tilelab"
    with torch.random.fork_rng(devices=[]):
        # Ours has [classes, C, H, W] where torch.nn has [classes, C*H*W], of which that is a view.
        shapes = [p.shape for p in models.build("cnn", (1, 28, 28), 10).parameters()]
        torch.manual_seed(0)
        model = models.build("cnn" if ours else "cnn-torch", (1, 28, 28), 10)
    model = model.to(device=device, memory_format=torch.channels_last)
    place, dtype = torch.device(device), w.torch_dtype
    gpu = place.type == "cuda"
    if impl == "reference":
        model, images, dtype = model.double(), images.double(), torch.float64
    half = dtype in (torch.float16, torch.bfloat16)

    if ours:
        optimizer = kernels.AdamW(model.parameters(), lr=0.001, capturable=True)
        copies = step.copies_of(model, optimizer) if dtype == torch.bfloat16 else {}
        leaves = list(copies.values()) or list(model.parameters())
        weight = step.weights(len(labels), place)

        def work():
            _, losses = step.learn(model, optimizer, images, labels, weight, copies, dtype)
            return losses.mean(), *(p.grad for p in leaves)

    else:
        fast = dict(fused=True, capturable=impl in IN_A_GRAPH) if gpu else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, **fast)
        leaves = list(model.parameters())

        def forward():
            with torch.autocast(place.type, dtype, enabled=half):
                logits = model(images)
            return F.cross_entropy(logits if impl == "reference" else logits.float(), labels)

        forward = as_peer(impl, forward)

        def work():
            loss = forward()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach(), *(p.grad for p in leaves)

    whole = step.Graph(work, torch.cuda.Stream(place) if gpu and impl in IN_A_GRAPH else None)
    weights = {*model.parameters(), *leaves}
    untrained = {x: x.detach().clone() for x in weights} if whole.stream else {}

    def call():
        _refuse_capture(images)
        if untrained:  # what is judged is what is timed: a replay, of the first step again
            whole()
            with torch.no_grad():
                for x, before in untrained.items():
                    x.copy_(before)
            untrained.clear()
        loss, *grads = whole()
        return loss, *(g.view(s) for g, s in zip(grads, shapes, strict=True))

    return call, [images, labels]


def stack(w, impl, device, make):
    """VGG16's convolutions, forward and backward; results: their output and all gradients."""
    from tilelab.nets import imagenet

    N, H, width = (w.shape[key] for key in ("N", "H", "width"))
    images, dy = make(N, 3, H, H), make(N, 8 * width, H // 32, H // 32)
    ours = impl == "tilelab"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = imagenet.vgg16_features if ours else imagenet.torch_vgg16_features
        model = build(width=width)
        for layer in model:
            if isinstance(layer, torch.nn.Conv2d):  # as VGG16 has them: activations keep their size
                torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    dtype = w.torch_dtype
    if impl == "reference":
        images, dy, dtype = images.double(), dy.double(), torch.float64
    model = model.to(device, dtype, memory_format=torch.channels_last)
    forward = as_peer(impl, model)
    parameters = list(model.parameters())

    def call():
        y = forward(images)
        return y.detach(), *torch.autograd.grad(y, parameters, dy)

    return call, [images, dy]


def _refuse_capture(x):
    """A training step that is in a graph of its own cannot be in another; nor are optimizers."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step is not captured, ours or peers': it may be a graph itself")

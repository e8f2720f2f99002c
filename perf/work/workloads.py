"""What is measured: each operator in each mode, by our kernels and its peers, on the same inputs.

A workload is an operator, a mode, a dtype and a shape. Everything else follows from it:

    inputs      random in [-1, 1] (zeros would make a GPU faster than it is), or empty ones that are
                only compiled for
    call        a function of no arguments that does the work once, and returns its results
    reference   the peer's formula in float64

The modes are `fwd`; `dgrad` and `wgrad`, the gradients of the first and of the second factor of a
product; `bwd`, all gradients at once; `fwdbwd`, where the gradient is made on the way forward; and
`step`. A gradient is asked for through autograd, of ours and of the peers alike: only those inputs
require it that the mode is about, and the forward pass is over before the clock starts.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tilelab.perf.errors import PerfError
from tilelab.perf.work import cost

from tilelab import kernels

DTYPES = {  # as users type them: dtype and how float32 products are rounded
    "bf16": ("bfloat16", "ieee"),
    "fp16": ("float16", "ieee"),
    "fp32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "fp8": ("float8_e4m3fn", "ieee"),
    "int8": ("int8", "ieee"),
}
PEERS = {
    "torch": "PyTorch: cuBLAS, cuDNN in channels_last with benchmark=True",
    "graph": "PyTorch as above, a whole training step in a CUDA graph (train_step)",
    "compile": "torch.compile, max-autotune; a training step in a CUDA graph",
    "inductor": "Inductor's own Triton template (products and convolutions forward)",
}


class Workload(NamedTuple):
    """One thing to measure. `shape` has the keys of perf/work/shapes.py."""

    op: str
    mode: str
    dtype: str
    precision: str
    shape: dict[str, int]
    name: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    @property
    def flops(self) -> int:
        """That the mathematics asks for."""
        return cost.flops(self.op, self.mode, self.shape)

    @property
    def bytes(self) -> int:
        """That must be read and written at least."""
        return cost.minimum_bytes(self.op, self.mode, self.shape, self.torch_dtype.itemsize)


class Op(NamedTuple):
    """How to call an operator.

    `modes` gives, for each mode, the names by which `choose_tile` knows the kernel that is swept
    (whichever is asked for first: the shape decides, and the others are not asked for); `inputs`
    makes the tensors by name; `wrt` are those that a mode differentiates; `ours` and `theirs`
    compute the result from the tensors; `dtypes` it has.
    """

    modes: dict[str, tuple[str, ...]]
    inputs: Callable[[dict, "Maker"], dict[str, torch.Tensor]]
    wrt: dict[str, tuple[str, ...]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "tf32")


class Maker:
    """Makes input tensors: random ones from a seed, or empty ones where `seed` is None."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int | None) -> None:
        self.dtype, self.device = dtype, device
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """A tensor of values in [-1, 1]; an image (four dimensions) is channels_last."""
        memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        x = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=memory)
        return x if self.generator is None else x.uniform_(-1, 1, generator=self.generator)

    def eight_bit(self, *shape: int) -> torch.Tensor:
        """Values over the whole range of an 8-bit dtype, as scales make operands have."""
        if self.generator is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        top = 127 if self.dtype == torch.int8 else 448
        x = torch.empty(shape, device=self.device).uniform_(-top, top, generator=self.generator)
        return x.to(self.dtype)

    def scale(self) -> torch.Tensor:
        """A scale in [0.001, 0.002], float32 []."""
        x = torch.empty((), device=self.device)
        return x if self.generator is None else x.uniform_(0.001, 0.002, generator=self.generator)

    def classes(self, rows: int, classes: int) -> torch.Tensor:
        """Class indices, int64 [rows]."""
        if self.generator is None:
            return torch.zeros(rows, dtype=torch.int64, device=self.device)
        return torch.randint(classes, (rows,), device=self.device, generator=self.generator)


def _conv_inputs(s, make):
    return dict(
        x=make(s["N"], s["C"], s["H"], s["W"]),
        weight=make(s["K"], s["C"] // s["groups"], s["R"], s["S"]),
    )


def _fused_inputs(s, make):
    return _conv_inputs(s, make) | dict(bias=make(s["K"]))


def _geometry(s):
    return s["stride"], s["padding"], s["dilation"], s["groups"]


def _columns(x, s):
    """unfold, with the columns in our order: [N*P*Q, (group, r, s, channel)]."""
    taps, C = s["R"] * s["S"], s["C"] // s["groups"]
    columns = F.unfold(x, (s["R"], s["S"]), s["dilation"], s["padding"], s["stride"])
    columns = columns.view(len(x), s["groups"], C, taps, -1).permute(0, 4, 1, 3, 2)
    return columns.reshape(-1, s["C"] * taps)


def _fold(columns, s):
    taps, C = s["R"] * s["S"], s["C"] // s["groups"]
    columns = columns.view(s["N"], -1, s["groups"], taps, C).permute(0, 2, 4, 3, 1)
    return F.fold(
        columns.reshape(s["N"], s["C"] * taps, -1), (s["H"], s["W"]), (s["R"], s["S"]),
        s["dilation"], s["padding"], s["stride"],
    )  # fmt: skip


def _col2im_inputs(s, make):
    P, Q = cost.output_size(s)
    return dict(columns=make(s["N"] * P * Q, s["C"] * s["R"] * s["S"]))


def _scaled_inputs(s, make):
    """B is the transpose of a row-major [N, K], as weights are; one scale a tensor."""
    a, b = make.eight_bit(s["M"], s["K"]), make.eight_bit(s["N"], s["K"]).t()
    return dict(a=a, b=b, scale_a=make.scale(), scale_b=make.scale())


def _scaled_mm(s, a, b, scale_a, scale_b):
    """With scales of whole tensors, cuBLASLt's fastest; of int8 it has none, and nor has torch."""
    if scale_a.dtype == torch.float64:  # the reference
        return (a.double() @ b.double()) * scale_a * scale_b
    if a.dtype == torch.int8:
        return (torch._int_mm(a, b) * (scale_a * scale_b)).bfloat16()
    fast = a.is_cuda  # sums as our kernel has them
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _conv_bias_relu(s, x, weight, bias):
    """All in cuDNN's own epilogue where nobody follows: no other peer is as fast in 16 bits."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and not _traced():
        stride, padding, dilation = ((s[k], s[k]) for k in ("stride", "padding", "dilation"))
        with contextlib.suppress(RuntimeError):  # if no engine of cuDNN has this one
            return torch.cudnn_convolution_relu(
                x, weight, bias, stride, padding, dilation, s["groups"]
            )
    return F.relu(F.conv2d(x, weight, bias, *_geometry(s)))


def _traced():
    """Whether somebody follows what is computed: autograd, or torch.compile."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


# A 1x1 convolution is a product of matrices, a depthwise one has a kernel of its own.
CONV_FORWARD = ("conv2d", "conv2d_flat", "conv2d_grouped", "conv2d_depthwise", "matmul")
CONV_WRT = {"dgrad": ("x",), "wgrad": ("weight",)}
OPS: dict[str, Op] = {
    "matmul": Op(
        dict.fromkeys(("fwd", "dgrad", "wgrad"), ("matmul",)),
        lambda s, make: dict(a=make(s["M"], s["K"]), b=make(s["K"], s["N"])),
        {"dgrad": ("a",), "wgrad": ("b",)},
        lambda s, a, b: kernels.matmul(a, b),
        lambda s, a, b: a @ b,
    ),
    "matmul_bias_relu": Op(  # forward alone: its gradients are those of matmul and bias_relu
        {"fwd": ("matmul",)},
        lambda s, make: dict(a=make(s["M"], s["K"]), b=make(s["K"], s["N"]), bias=make(s["N"])),
        {},
        lambda s, a, b, bias: kernels.matmul(a, b, bias, "relu"),
        lambda s, a, b, bias: torch.addmm(bias, a, b).relu(),
    ),
    "conv2d": Op(
        {
            "fwd": CONV_FORWARD,
            "dgrad": ("conv2d_input_grad", "matmul"),
            "wgrad": ("conv2d_weight_grad",),
        },
        _conv_inputs,
        CONV_WRT,
        lambda s, x, weight: kernels.conv2d(x, weight, None, *_geometry(s)),
        lambda s, x, weight: F.conv2d(x, weight, None, *_geometry(s)),
    ),
    "conv2d_bias_relu": Op(  # forward alone, as matmul_bias_relu
        {"fwd": CONV_FORWARD},
        _fused_inputs,
        {},
        lambda s, x, weight, bias: kernels.conv2d(x, weight, bias, *_geometry(s), "relu"),
        _conv_bias_relu,
    ),
    "conv2d_im2col": Op(
        dict.fromkeys(("fwd", "dgrad", "wgrad"), ("matmul",)),
        _conv_inputs,
        CONV_WRT,
        lambda s, x, weight: kernels.conv2d_im2col(x, weight, None, *_geometry(s)),
        lambda s, x, weight: F.conv2d(x, weight, None, *_geometry(s)),
    ),
    "conv2d_relu_pool": Op(
        {
            "fwd": ("conv2d_relu_pool",),
            # Fused, or of wide layers the plain convolution's, of what is scattered before.
            "dgrad": ("conv2d_relu_pool_input_grad", "conv2d_input_grad"),
            "wgrad": ("conv2d_relu_pool_weight_grad", "conv2d_weight_grad"),
        },
        _fused_inputs,
        {"dgrad": ("x",), "wgrad": ("weight", "bias")},
        lambda s, x, weight, bias: kernels.conv2d_relu_pool(x, weight, bias, s["padding"]),
        lambda s, *tensors: F.max_pool2d(_conv_bias_relu(s, *tensors), 2),
    ),
    "im2col": Op(
        {"fwd": ("im2col",)},
        lambda s, make: dict(x=make(s["N"], s["C"], s["H"], s["W"])),
        {},
        lambda s, x: kernels.im2col(x, (s["R"], s["S"]), *_geometry(s)),
        lambda s, x: _columns(x, s),
    ),
    "col2im": Op(
        {"fwd": ("col2im",)},
        _col2im_inputs,
        {},
        lambda s, columns: kernels.col2im(
            columns, (s["N"], s["C"], s["H"], s["W"]), (s["R"], s["S"]), *_geometry(s)
        ),
        lambda s, columns: _fold(columns, s),
    ),
    "bias_relu": Op(
        {"fwd": ("bias_relu",), "bwd": ("bias_relu_backward",)},
        lambda s, make: dict(x=make(s["N"], s["C"], s["H"], s["W"]), bias=make(s["C"])),
        {"bwd": ("x", "bias")},
        lambda s, x, bias: kernels.bias_relu(x, bias),
        lambda s, x, bias: F.relu(x + bias[:, None, None]),
    ),
    "softmax": Op(
        {"fwd": ("softmax",), "bwd": ("softmax_backward",)},
        lambda s, make: dict(x=make(s["M"], s["N"])),
        {"bwd": ("x",)},
        lambda s, x: kernels.softmax(x),
        lambda s, x: F.softmax(x, -1),
    ),
    "cross_entropy": Op(
        dict.fromkeys(("fwd", "fwdbwd"), ("cross_entropy",)),
        lambda s, make: dict(logits=make(s["M"], s["N"]), target=make.classes(s["M"], s["N"])),
        {"fwdbwd": ("logits",)},
        lambda s, logits, target: kernels.cross_entropy(logits, target),
        lambda s, logits, target: F.cross_entropy(logits, target),
    ),
    "max_pool2d": Op(
        {"fwd": ("max_pool2d",), "bwd": ("max_pool2d_backward",)},
        lambda s, make: dict(x=make(s["N"], s["C"], s["H"], s["W"])),
        {"bwd": ("x",)},
        lambda s, x: kernels.max_pool2d(x, s["R"], s["stride"], s["padding"]),
        lambda s, x: F.max_pool2d(x, s["R"], s["stride"], s["padding"]),
    ),
    "scaled_matmul": Op(
        {"fwd": ("scaled_matmul",)},
        _scaled_inputs,
        {},
        lambda s, *tensors: kernels.scaled_matmul(*tensors),
        _scaled_mm,
        ("fp8", "int8"),
    ),
    # Not functions: `prepare` knows these four.
    "sgd": Op({"step": ("sgd",)}, None, {}, None, None),
    "adamw": Op({"step": ("adamw",)}, None, {}, None, None),
    "train_step": Op({"step": ()}, None, {}, None, None),
    "conv_stack": Op({"step": ()}, None, {}, None, None),
}
WHOLE = ("train_step", "conv_stack")  # made of what nets composes
IN_A_GRAPH = ("tilelab", "graph", "compile")  # of a training step on a GPU
GRADIENTS = ("dgrad", "wgrad", "bwd", "fwdbwd")


def modes(op: str, text: str) -> list[str]:
    """The modes of `op` that `text` names: "fwd,dgrad", "bwd" (every gradient) or "all".

    Raises:
        PerfError: an unknown operator or mode. A mode that only other operators have is left out;
            what has `step` alone does that, whatever is asked for.
    """
    if op not in OPS:
        raise PerfError(f"unknown operator {op!r}: there are {', '.join(OPS)}")
    has = OPS[op].modes
    chosen = []
    for mode in text.split(","):
        if mode not in ("all", "fwd", "step", *GRADIENTS):
            raise PerfError(
                f"unknown mode {mode!r}: fwd, dgrad, wgrad, bwd (all gradients), step or all"
            )
        wanted = has if mode == "all" or has.keys() == {"step"} else (mode,)
        if mode == "bwd":
            wanted = GRADIENTS
        chosen += [m for m in has if m in wanted and m not in chosen]
    return chosen


def offers(peer: str, w: Workload) -> bool:
    """Whether a peer has something of its own for this work: Inductor's templates are products."""
    if w.op == "scaled_matmul":  # what torch._scaled_mm and torch._int_mm take
        M, N, K = (w.shape[k] for k in "MNK")
        unit, least = (8, 17) if w.dtype == "int8" else (16, 1)
        return peer == "torch" and not (N % unit or K % unit) and M >= least
    if peer == "graph":
        return w.op == "train_step"
    if peer != "inductor":
        return True
    convolutions = ("conv2d", "conv2d_bias_relu", "conv2d_im2col")
    return w.op in ("matmul", "matmul_bias_relu") or (
        w.op in convolutions and w.mode == "fwd" and w.shape["dilation"] == 1
    )


def prepare(w: Workload, impl: str, device: str, seed: int | None) -> Callable[[], tuple]:
    """Make inputs, and return the function that does the work once on them.

    Args:
        w: what to do.
        impl: "tilelab", a peer (see PEERS), or "reference": the peer's formula in float64.
        device: where.
        seed: of the inputs; the same seed gives every implementation the same values. With None
            they are left empty.

    Returns:
        A function that returns the results, a tuple of tensors. Its attribute `inputs` has the
        tensors that it must not change.

    Raises:
        PerfError: a peer that does not exist for this workload.
    """
    if impl in PEERS and not offers(impl, w):
        raise PerfError(f"{impl} has nothing for {w.op} {w.mode}")
    if impl not in ("tilelab", "reference", *PEERS):
        raise PerfError(f"unknown peer {impl!r}: there are {', '.join(PEERS)}")
    make = Maker(w.torch_dtype, device, seed)
    if w.op in ("sgd", "adamw"):
        call, inputs = _optimizer(w, impl, make)
    elif w.op == "train_step":
        call, inputs = _training(w, impl, device, make)
    elif w.op == "conv_stack":
        call, inputs = _stack(w, impl, device, make)
    else:
        call, inputs = _function(w, impl, make)
    call.inputs = inputs
    return call


def _function(w, impl, make):
    op = OPS[w.op]
    inputs = op.inputs(w.shape, make)
    if impl == "reference":
        inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    wrt = [inputs[name].requires_grad_() for name in op.wrt.get(w.mode, ())]
    formula = op.ours if impl == "tilelab" else op.theirs

    def forward(*tensors):
        return formula(w.shape, *tensors)

    if impl not in ("tilelab", "reference"):
        forward = _peer(w, impl, forward)
    tensors = list(inputs.values())
    if w.mode == "fwd":

        def call():
            with torch.no_grad():
                return (forward(*tensors),)

        return call, tensors

    if w.mode == "fwdbwd":

        def call():
            y = forward(*tensors)
            return y.detach(), *torch.autograd.grad(y, wrt)

        return call, tensors

    y = forward(*tensors)
    dy = make(*y.shape).to(y.dtype)  # after the inputs: the same values for every implementation

    def call():
        return torch.autograd.grad(y, wrt, dy, retain_graph=True)

    return call, [*tensors, dy]


def _peer(w, impl, forward):
    """`forward` as the peer runs it."""
    if impl == "torch":
        return forward
    _set_up_compile()
    if impl == "compile":
        return torch.compile(forward, mode="max-autotune-no-cudagraphs", dynamic=False)
    options = {
        "max_autotune": True,
        "max_autotune_gemm_backends": "TRITON",
        "max_autotune_conv_backends": "TRITON",
    }
    return torch.compile(forward, options=options, dynamic=False)


def _set_up_compile():
    """Settings of torch.compile without which it would not be a peer, or would not run."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from triton import knobs

    functorch.donated_buffer = False  # a gradient is taken again and again, of one forward pass
    # Beyond its limit of recompilations it would run uncompiled, and only a log would say so.
    dynamo.fail_on_recompile_limit_hit = True
    inductor.autotune_num_choices_displayed = 0  # no tables on the screen
    # Inductor moves Triton's cache, unless it has a place: our compiled tiles are in the usual one.
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)


def forget_compiled() -> None:
    """Let torch.compile start afresh: it compiles a function for eight sets of shapes at most.

    All workloads are one function to it. What was compiled before is compiled again if called.
    """
    torch._dynamo.reset()


@contextlib.contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Within this context cuDNN tries its algorithms (the first time), or takes its own guess."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _optimizer(w, impl, make):
    """One step over `tensors` parameters of `elements` each; the results are the parameters."""
    s = w.shape
    params, grads = ([make(s["elements"]) for _ in range(s["tensors"])] for _ in range(2))
    if impl == "reference":
        params, grads = ([x.double() for x in xs] for xs in (params, grads))
    for p, grad in zip(params, grads, strict=True):
        p.requires_grad_().grad = grad
    options = {"lr": 0.01} | ({"momentum": 0.9} if w.op == "sgd" else {})
    if impl == "torch":
        options["fused"] = params[0].is_cuda  # its fastest, where it has one
    source = kernels if impl == "tilelab" else torch.optim
    optimizer = getattr(source, "SGD" if w.op == "sgd" else "AdamW")(params, **options)
    step = optimizer.step
    if impl not in ("tilelab", "reference"):
        step = _peer(w, impl, step)

    def call():
        _refuse_capture(params[0])
        step()
        return tuple(p.detach() for p in params)

    return call, grads


def _training(w, impl, device, make):
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

        if impl != "reference":  # "graph" is what torch does, in a graph
            forward = _peer(w, "torch" if impl == "graph" else impl, forward)

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


def _stack(w, impl, device, make):
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
    forward = model if impl in ("tilelab", "reference") else _peer(w, impl, model)
    parameters = list(model.parameters())

    def call():
        y = forward(images)
        return y.detach(), *torch.autograd.grad(y, parameters, dy)

    return call, [images, dy]


def _refuse_capture(x):
    """A training step that is in a graph of its own cannot be in another; nor are optimizers."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step is not captured, ours or peers': it may be a graph itself")


def set_precision(precision: str) -> None:
    """Of float32 products and convolutions, ours and torch's: "ieee" or "tf32"."""
    # The older flags, since they set the newer ones too. The other way round Inductor, which reads
    # the older ones, gets an error: that the two contradict each other.
    with warnings.catch_warnings():  # that they are old
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def tolerance(w: Workload, results: int, impl: str = "tilelab") -> float:
    """The largest acceptable relative error in the 2-norm, ||got - reference|| / ||reference||.

    A rounding to the dtype, the sum of `terms` products in float32 (of float8: in 14 bits, as on
    Hopper), and TF32 where it is on, as tests/tools/tolerance.py derives them; twice that, since
    gradients round twice. Peers have four times as much: cuBLAS may add partial sums in 16 bits,
    and cuDNN transform (Winograd). Where a maximum decides which way a gradient goes, float32
    decides differently from float64 in about one window of a million; one way in a million is 1e-3
    of the norm. Of TF32 products it is one window in a thousand, and one in a hundred of 16-bit
    activations, as in a training step and in peers, which round a convolution's result before they
    pool it: there the gate only keeps out what is plainly wrong. Through a stack of convolutions
    the ways that differ multiply; what has nothing to do with the reference is at 1 and beyond.
    """
    terms = max(1, w.flops // (2 * max(results, 1)))
    dtype = torch.bfloat16 if w.op == "scaled_matmul" else w.torch_dtype  # of the results
    bound = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps * math.sqrt(terms)
    if w.dtype == "float8_e4m3fn":
        bound += 2 * 2.0**-13 * math.sqrt(terms)
    if w.precision == "tf32":
        bound += 2 * 2.0**-10
    routed = (w.op == "conv2d_relu_pool" and w.mode != "fwd") or w.op in WHOLE
    rounded = w.dtype != "float32" and (w.op in WHOLE or impl != "tilelab")
    if routed and (rounded or w.precision == "tf32"):
        return 0.6 if w.op == "conv_stack" else 0.3
    if w.op in WHOLE:
        bound *= 4 if w.op == "train_step" else 14  # as many layers, each of which rounds, and one
    return (2 if impl == "tilelab" else 8) * bound + (5e-3 if routed else 0.0)

"""The operators: one row has everything that `perf` knows of an operator.

A row says how to call the operator and what it is compared with, what it costs, which sizes are
measured and which tiles are tried. perf/README.md says how to add one. What is too long for a row
stands in the files beside this one, which know no operator by its name:

    formulas.py       inputs, and torch's formulas         networks.py      sizes, from layers
    cost.py           FLOPs, bytes, sizes that misfit      search_space.py  axes, and tiles by TMA
    training.py       optimizers and training steps        boxes.py         what a box computes
"""

from __future__ import annotations  # of torch, which is not imported here

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from tilelab.perf.work import cost, networks, search_space
from tilelab.perf.work.cost import Sizes
from tilelab.perf.work.networks import Shape
from tilelab.perf.work.search_space import TileOp


def import_what_rows_call() -> None:
    """Import torch, the kernels and the files beside this one that need them; workloads.py does.

    Torch takes seconds to import. Plots and tables read rows without it, so what needs it stands
    within a lambda.
    """
    global torch, F, kernels, boxes, formulas, training
    import torch
    import torch.nn.functional as F

    from tilelab import kernels
    from tilelab.perf.work import boxes, formulas, training


class Mode(NamedTuple):
    """What an operator does in one mode: forward, a gradient, both ways, or a step."""

    # Whose tile is swept, by the names that `choose_tile` is asked for. The shape decides which of
    # them is asked for first. Empty where there is no one tile.
    tile_ops: tuple[TileOp, ...]
    flops: Callable[[Sizes], int]  # that the mathematics asks for
    bytes: Callable[[Sizes, int], int]  # read and written at least; of the sizes and an element's
    wrt: tuple[str, ...] = ()  # the inputs that it differentiates
    # The largest acceptable error where a maximum, of what was rounded, decides which way a
    # gradient goes; 0 if none does.
    misrouted: float = 0.0


class Sweep(NamedTuple):
    """What `tilelab gpu` sweeps of an operator."""

    name: str = ""  # of the task; "" is the operator's. Rows that name the same task share it
    seconds: float = 20  # its weight among the others: about its seconds of a budget of 1500
    shapes: str = ""  # as --shapes takes them; "" is the operator's default
    mode: str = "all"  # this and the next two are as the options of `tilelab sweep`
    dtype: str = ""  # "" is the first that the operator has
    peers: str = "torch"
    turn: int = 1  # sweeps of turn 1 are worth most and come first, in the order of the rows
    ops: tuple[str, ...] = ()  # gpu_tasks.py fills it
    more: tuple[str, ...] = ()  # further options, but not of the second look at the default tile


def torch_and_compile(w: Any) -> tuple[str, ...]:
    """The peers of most work: torch, and what torch.compile makes of it."""
    return ("torch", "compile")


def _with_inductor(w: Any) -> tuple[str, ...]:
    """Inductor has a Triton template for products, and for convolutions forward."""
    fits = "R" not in w.shape or (w.mode == "fwd" and w.shape["dilation"] == 1)
    return ("torch", "compile", "inductor") if fits else torch_and_compile(w)


class Operator(NamedTuple):
    """An operator."""

    lesson: str  # its file in kernels/; "" for what the whole of kernels/ and nets/ makes
    sizes: tuple[str, ...]  # the keys of a shape
    default: str  # the shapes that are measured unless others are asked for, as --shapes takes them
    tiny: list[tuple[int, ...]]  # the sizes of the set "tiny", which divide nothing
    modes: dict[str, Mode]  # what it does, by mode
    # Makes its tensors by name, of the sizes and a `formulas.Maker`.
    inputs: Callable[[Sizes, formulas.Maker], dict[str, torch.Tensor]] | None = None
    ours: Callable[..., Any] | None = None  # computes the result, of the sizes and the tensors
    theirs: Callable[..., Any] | None = None  # the same by torch; in float64 it is the reference
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "tf32")  # as users type them
    implied: dict[str, str | int] = {}  # sizes that need not be given: a number, or another's key
    misfit: Callable[[Sizes], str | None] = lambda s: None  # why sizes make no workload, if so
    # The sizes that a layer of a network has for it (networks.py).
    layer: Callable[[Any, Any, int], Sizes | None] = lambda layer, following, N: None
    # Further sets of shapes by name, each a function of the batch; they come before `layer`.
    sets: dict[str, Callable[[int], list[Shape]]] = {}
    # Those that have something of their own for a workload.
    peers: Callable[[Any], tuple[str, ...]] = torch_and_compile
    product: bool = False  # arithmetic is what counts: speeds are in FLOP/s, not bytes/s
    result: str = ""  # the dtype of its results, where it is not the one of its inputs
    layers: int = 1  # how many layers round their results, one after another
    # Makes the call instead of `inputs`, `ours` and `theirs` (training.py).
    prepare: Callable[..., tuple] | None = None
    sweeps: tuple[Sweep, ...] = (Sweep(),)  # its tasks in `tilelab gpu`


# --- kernels whose tile is swept, as far as several modes have them ------------------------------

_CONV_BY_TMA = search_space.fast_convolutions
_A_AND_B = (
    {"stride_ak": "BLOCK_K", "stride_am": "BLOCK_M"},
    {"stride_bk": "BLOCK_K", "stride_bn": "BLOCK_N"},
)
_PIXELS_AND_FILTERS = (
    {"stride_xc": "BLOCK_K", "stride_xw": "BLOCK_M"},
    {"stride_wc": "BLOCK_K", "stride_wk": "BLOCK_N"},
)
MATMUL = TileOp(
    "matmul", search_space.PRODUCT | {"GROUP_M": (8,)}, search_space.fast_products,
    strides=_A_AND_B,
)  # fmt: skip
SCALED_MATMUL = MATMUL._replace(
    name="scaled_matmul",
    axes=search_space.PRODUCT | {"BLOCK_K": (64, 128, 256), "GROUP_M": (8,)},
)
CONV = TileOp(
    "conv2d", search_space.PRODUCT, _CONV_BY_TMA, lambda given: boxes.forward(given),
    strides=_PIXELS_AND_FILTERS,
)  # fmt: skip
CONV_FLAT = TileOp(
    "conv2d_flat",
    search_space.FLAT,
    functools.partial(_CONV_BY_TMA, split=False),
    lambda given: boxes.forward(given),
    strides=_PIXELS_AND_FILTERS,
)
CONV_GROUPED = CONV._replace(
    name="conv2d_grouped", fast=functools.partial(_CONV_BY_TMA, filters=(64,), split=False)
)
CONV_DEPTHWISE = TileOp("conv2d_depthwise", search_space.DEPTHWISE)
CONV_DGRAD = TileOp(
    "conv2d_input_grad", search_space.PRODUCT, _CONV_BY_TMA, lambda given: boxes.input_grad(given),
    strides=(
        {"stride_dyk": "BLOCK_K", "stride_dyq": "BLOCK_M"},
        {"stride_wk": "BLOCK_K", "stride_wc": "BLOCK_N"},
    ),
)  # fmt: skip
CONV_WGRAD = TileOp(
    "conv2d_weight_grad", search_space.PRODUCT, search_space.fast_weight_gradients,
    lambda given: boxes.weight_grad(given),
    strides=(
        {"stride_dyk": "BLOCK_M", "stride_dyq": "BLOCK_K"},
        {"stride_xc": "BLOCK_N", "stride_xw": "BLOCK_K"},
    ),
)  # fmt: skip
FUSED = TileOp(
    "conv2d_relu_pool", search_space.FUSED, boxes=lambda given: boxes.forward(given), pooled=True,
    strides=_PIXELS_AND_FILTERS,
)  # fmt: skip
FUSED_DGRAD = FUSED._replace(
    name="conv2d_relu_pool_input_grad", boxes=None, strides=CONV_DGRAD.strides
)
FUSED_WGRAD = FUSED._replace(
    name="conv2d_relu_pool_weight_grad", boxes=None, strides=CONV_WGRAD.strides
)
SOFTMAX = TileOp("softmax", search_space.SOFTMAX, few_columns=search_space.FEW_COLUMNS)
SOFTMAX_BWD = SOFTMAX._replace(name="softmax_backward")
CROSS_ENTROPY = SOFTMAX._replace(name="cross_entropy")

# --- what several rows have in common ------------------------------------------------------------

_COMPILE = "torch,compile"
_PRODUCTS = dict(
    sizes=("M", "N", "K"),
    default="m=4096",
    tiny=[(37, 29, 53)],
    implied={"N": "M", "K": "M"},
    layer=networks.product,
    sets={
        "square": networks.square,
        "skinny": networks.skinny,
        "transformer": networks.transformer_products,
    },
    product=True,
)
_PRODUCT = (cost.product_flops, cost.product_bytes)
_PRODUCT_AND_BIAS = dict(
    lesson="matmul",
    modes={
        "fwd": Mode(
            (MATMUL,), cost.product_flops, lambda s, e: cost.product_bytes(s, e) + s["N"] * e
        )
    },
    inputs=lambda s, make: dict(a=make(s["M"], s["K"]), b=make(s["K"], s["N"]), bias=make(s["N"])),
    peers=_with_inductor,
)
_BIAS_AND_ACTIVATION = dict(
    lesson="bias_relu",
    sizes=("N", "C", "H", "W"),
    default="resnet50@32",
    tiny=[(2, 7, 5, 3)],
    implied={"W": "H"},
    layer=networks.relu,
    inputs=lambda s, make: dict(x=make(s["N"], s["C"], s["H"], s["W"]), bias=make(s["C"])),
)
_WINDOWS = {"W": "H", "S": "R", "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CONVOLUTIONS = dict(
    sizes=networks.CONV,
    default="n=32,c=128,h=28,w=28,k=128,r=3,s=3,padding=1",  # the middle of a ResNet
    tiny=[(2, 5, 11, 13, 7, 3, 2, 1, 1, 1, 1), (2, 6, 11, 13, 9, 3, 3, 2, 1, 2, 3)],
    implied=_WINDOWS,
    misfit=cost.conv_misfit,
    product=True,
)
_CONV = (cost.conv_flops, cost.conv_bytes)
_DGRAD = (cost.conv_flops, cost.conv_dgrad_bytes)
# A 1x1 convolution is a product of matrices, a depthwise one has a kernel of its own.
_FORWARD = (CONV, CONV_FLAT, CONV_GROUPED, CONV_DEPTHWISE, MATMUL)
_COLUMNS = dict(
    lesson="im2col",
    sizes=networks.COLUMNS,
    default="n=32,c=128,h=28,w=28,r=3,s=3,padding=1",
    tiny=[(2, 5, 11, 13, 3, 2, 1, 1, 1, 1), (2, 6, 11, 13, 3, 3, 2, 1, 2, 3)],
    implied=_WINDOWS,
    misfit=cost.conv_misfit,
    layer=networks.columns,
    sweeps=(Sweep("conv2d-im2col", 5, "resnet50@32", "fwd", "bf16", turn=3),),
)
_OPTIMIZERS = dict(
    lesson="optim",
    sizes=("tensors", "elements"),
    default="resnet50",
    tiny=[(5, 1031)],
    implied={"tensors": 1},
    sets={
        make.__name__: functools.partial(networks.parameters, name=make.__name__, network=make())
        for make in (networks.resnet50, networks.vgg16, networks.alexnet, networks.demo)
    }
    # 124,439,808 parameters in 148 tensors
    | {"transformer": lambda N: [Shape("gpt2 parameters", dict(tensors=148, elements=840_809))]},
    sweeps=(Sweep("optimizers", 12.5, "resnet50,vgg16", peers=_COMPILE),),
)


def _bias_modes(forward: tuple, backward: tuple) -> dict[str, Mode]:
    """The modes of a bias with an activation, of their FLOPs and bytes."""
    return {
        "fwd": Mode((TileOp("bias_relu", search_space.ROWS),), *forward),
        "bwd": Mode(
            (TileOp("bias_relu_backward", search_space.ROWS),), *backward, wrt=("x", "bias")
        ),
    }


def _scaled_peers(w: Any) -> tuple[str, ...]:
    """What torch._scaled_mm and torch._int_mm take."""
    M, N, K = (w.shape[k] for k in "MNK")
    unit, least = (8, 17) if w.dtype == "int8" else (16, 1)
    return ("torch",) if M >= least and not (N % unit or K % unit) else ()


OPERATORS: dict[str, Operator] = {
    "matmul": Operator(
        **_PRODUCTS,
        lesson="matmul",
        modes={
            "fwd": Mode((MATMUL,), *_PRODUCT),
            "dgrad": Mode((MATMUL,), *_PRODUCT, wrt=("a",)),
            "wgrad": Mode((MATMUL,), *_PRODUCT, wrt=("b",)),
        },
        inputs=lambda s, make: dict(a=make(s["M"], s["K"]), b=make(s["K"], s["N"])),
        ours=lambda s, a, b: kernels.matmul(a, b),
        theirs=lambda s, a, b: a @ b,
        peers=_with_inductor,
        sweeps=(
            Sweep("matmul-square", 90, "square", "fwd"),
            Sweep("matmul-transformer", 90, "transformer", "fwd"),
            Sweep("matmul-skinny", 50, "skinny", "fwd"),
            Sweep("matmul-fp16", 30, "square,transformer", "fwd", "fp16", turn=3),
            Sweep("matmul-tf32", 20, "square", "fwd", "tf32", turn=3),
            Sweep("matmul-gradients", 20, "transformer", "dgrad,wgrad", turn=3),
            # What torch.compile makes of products: its tuning takes long, and cannot be cut off.
            Sweep(
                "matmul-peers", 60, "square,transformer", "fwd", peers="compile,inductor", turn=4
            ),
        ),
    ),
    "matmul_bias_relu": Operator(  # forward alone: its gradients are those of matmul and bias_relu
        **_PRODUCTS | _PRODUCT_AND_BIAS,
        ours=lambda s, a, b, bias: kernels.matmul(a, b, bias, "relu"),
        theirs=lambda s, a, b, bias: torch.addmm(bias, a, b).relu(),
        sweeps=(Sweep(seconds=60, shapes="square,transformer", peers=_COMPILE),),
    ),
    "scaled_matmul": Operator(
        **_PRODUCTS,
        lesson="scaled_matmul",
        modes={
            "fwd": Mode(
                (SCALED_MATMUL,),
                cost.product_flops,
                lambda s, e: e * (s["M"] + s["N"]) * s["K"] + 2 * s["M"] * s["N"],
            )
        },
        inputs=lambda s, make: formulas.scaled_inputs(s, make),
        ours=lambda s, *tensors: kernels.scaled_matmul(*tensors),
        theirs=lambda s, *tensors: formulas.scaled_mm(s, *tensors),
        dtypes=("fp8", "int8"),
        peers=_scaled_peers,
        result="bfloat16",
        sweeps=(
            Sweep("scaled-matmul-fp8", 20, "square,transformer", "fwd", "fp8", turn=3),
            Sweep("scaled-matmul-int8", 15, "square,transformer", "fwd", "int8", turn=3),
        ),
    ),
    "matmul_bias_gelu": Operator(  # forward alone, where GELU is fused
        **_PRODUCTS | _PRODUCT_AND_BIAS,
        ours=lambda s, a, b, bias: kernels.matmul(a, b, bias, "gelu"),
        theirs=lambda s, a, b, bias: F.gelu(torch.addmm(bias, a, b)),
        sweeps=(Sweep(seconds=30, shapes="transformer", peers=_COMPILE, turn=3),),
    ),
    "bias_relu": Operator(
        **_BIAS_AND_ACTIVATION,
        modes=_bias_modes(cost.per_element(2, 2), cost.per_element(2, 3)),
        ours=lambda s, x, bias: kernels.bias_relu(x, bias),
        theirs=lambda s, x, bias: F.relu(x + bias[:, None, None]),
        sweeps=(Sweep(seconds=25, shapes="resnet50@32", peers=_COMPILE),),
    ),
    "bias_gelu": Operator(
        **_BIAS_AND_ACTIVATION,
        modes=_bias_modes(cost.per_element(6, 2), cost.per_element(13, 3)),
        ours=lambda s, x, bias: kernels.bias_activation(x, bias, "gelu"),
        theirs=lambda s, x, bias: F.gelu(x + bias[:, None, None]),
        sweeps=(Sweep(seconds=15, shapes="resnet50@32", peers=_COMPILE, turn=3),),
    ),
    "softmax": Operator(
        lesson="softmax",
        sizes=("M", "N"),
        default="classes",
        tiny=[(11, 37)],
        layer=networks.scores,
        sets={"classes": networks.classes, "transformer": networks.transformer_scores},
        modes={
            "fwd": Mode((SOFTMAX,), *cost.per_element(5, 2)),
            "bwd": Mode((SOFTMAX_BWD,), *cost.per_element(4, 3), wrt=("x",)),
        },
        inputs=lambda s, make: dict(x=make(s["M"], s["N"])),
        ours=lambda s, x: kernels.softmax(x),
        theirs=lambda s, x: F.softmax(x, -1),
        sweeps=(Sweep(seconds=35, shapes="classes,transformer", peers=_COMPILE),),
    ),
    "cross_entropy": Operator(
        lesson="cross_entropy",
        sizes=("M", "N"),
        default="classes",
        tiny=[(11, 37)],
        layer=networks.scores,
        sets={"classes": networks.classes, "transformer": networks.transformer_vocabulary},
        modes={
            "fwd": Mode((CROSS_ENTROPY,), *cost.per_element(5, 1)),
            "fwdbwd": Mode((CROSS_ENTROPY,), *cost.per_element(7, 2), wrt=("logits",)),
        },
        inputs=lambda s, make: dict(
            logits=make(s["M"], s["N"]), target=make.classes(s["M"], s["N"])
        ),
        ours=lambda s, logits, target: kernels.cross_entropy(logits, target),
        theirs=lambda s, logits, target: F.cross_entropy(logits, target),
        sweeps=(Sweep(seconds=35, shapes="classes,transformer", peers=_COMPILE),),
    ),
    "max_pool2d": Operator(
        lesson="pool",
        sizes=("N", "C", "H", "W", "R", "stride", "padding"),
        default="resnet50@32",
        tiny=[(2, 7, 13, 11, 3, 2, 1)],
        implied={"W": "H", "stride": "R", "padding": 0},
        misfit=cost.pool_misfit,
        layer=networks.pool,
        modes={
            "fwd": Mode(
                (TileOp("max_pool2d", search_space.ROWS),),
                lambda s: cost.outputs(s) * (s["R"] ** 2 - 1),
                lambda s, e: e * (cost.read(s) + cost.outputs(s)),
            ),
            "bwd": Mode(
                (TileOp("max_pool2d_backward", search_space.ROWS),),
                cost.outputs,
                lambda s, e: e * (cost.image(s) + cost.outputs(s)) + cost.outputs(s),
                wrt=("x",),
            ),
        },
        inputs=lambda s, make: dict(x=make(s["N"], s["C"], s["H"], s["W"])),
        ours=lambda s, x: kernels.max_pool2d(x, s["R"], s["stride"], s["padding"]),
        theirs=lambda s, x: F.max_pool2d(x, s["R"], s["stride"], s["padding"]),
        sweeps=(Sweep(shapes="resnet50@32,vgg16@32", peers=_COMPILE),),
    ),
    "sgd": Operator(
        **_OPTIMIZERS,
        modes={"step": Mode((TileOp("sgd", search_space.OPTIMIZER),), *cost.per_element(4, 5))},
        prepare=lambda *work: training.optimizer(*work, "SGD", lr=0.01, momentum=0.9),
    ),
    "adamw": Operator(
        **_OPTIMIZERS,
        modes={"step": Mode((TileOp("adamw", search_space.OPTIMIZER),), *cost.per_element(14, 7))},
        prepare=lambda *work: training.optimizer(*work, "AdamW", lr=0.01),
    ),
    "conv2d": Operator(
        **_CONVOLUTIONS,
        lesson="conv2d",
        layer=networks.convolution,
        sets={"mobilenet": networks.mobilenet},
        modes={
            "fwd": Mode(_FORWARD, *_CONV),
            "dgrad": Mode((CONV_DGRAD, MATMUL), *_DGRAD, wrt=("x",)),
            "wgrad": Mode((CONV_WGRAD,), *_CONV, wrt=("weight",)),
        },
        inputs=lambda s, make: formulas.conv_inputs(s, make),
        ours=lambda s, x, weight: kernels.conv2d(x, weight, None, *formulas.geometry(s)),
        theirs=lambda s, x, weight: F.conv2d(x, weight, None, *formulas.geometry(s)),
        peers=_with_inductor,
        sweeps=(
            Sweep("conv2d-resnet50", 80, "resnet50@32", "fwd"),
            Sweep("conv2d-vgg16", 50, "vgg16@32", "fwd"),
            Sweep("conv2d-large", 80, "resnet50@256,vgg16@256", "fwd", turn=2),
            Sweep("conv2d-stems", 25, "stems", "fwd", turn=2),
            Sweep("conv2d-resnext50", 30, "resnext50", "fwd", turn=2),
            Sweep("conv2d-mobilenet", 40, "mobilenet", "fwd", turn=2),
            Sweep("conv2d-dgrad", 80, "resnet50@32,vgg16@32", "dgrad", turn=2),
            Sweep("conv2d-wgrad", 80, "resnet50@32,vgg16@32", "wgrad", turn=2),
            Sweep("conv2d-dgrad-large", 90, "resnet50@256,vgg16@256", "dgrad", turn=2),
            Sweep("conv2d-wgrad-large", 90, "resnet50@256,vgg16@256", "wgrad", turn=2),
            Sweep("conv2d-fp16", 30, "resnet50@32", "fwd", "fp16", turn=3),
            Sweep("conv2d-tf32", 20, "resnet50@32", "fwd", "tf32", turn=3),
            Sweep("conv2d-peers", 60, "resnet50@32", "fwd", peers="compile,inductor", turn=4),
        ),
    ),
    "conv2d_bias_relu": Operator(  # forward alone, as matmul_bias_relu
        **_CONVOLUTIONS,
        lesson="conv2d",
        layer=networks.convolution_and_relu,
        modes={
            "fwd": Mode(_FORWARD, cost.conv_flops, lambda s, e: cost.conv_bytes(s, e) + s["K"] * e)
        },
        inputs=lambda s, make: formulas.fused_inputs(s, make),
        ours=lambda s, x, weight, bias: kernels.conv2d(
            x, weight, bias, *formulas.geometry(s), "relu"
        ),
        theirs=lambda s, *tensors: formulas.conv_bias_relu(s, *tensors),
        peers=_with_inductor,
        sweeps=(Sweep(seconds=60, shapes="resnet50@32,vgg16@32", peers=_COMPILE),),
    ),
    "conv2d_relu_pool": Operator(
        **_CONVOLUTIONS
        | dict(tiny=[(2, 5, 11, 13, 7, 3, 3, 1, 1, 1, 1)], misfit=cost.fused_misfit),
        lesson="conv2d_relu_pool",
        layer=networks.convolution_relu_and_pool,
        modes={
            "fwd": Mode((FUSED,), cost.fused_flops, cost.fused_bytes),
            # Fused, or of wide layers the plain convolution's, of what is scattered before.
            "dgrad": Mode(
                (FUSED_DGRAD, CONV_DGRAD), cost.fused_flops, cost.fused_dgrad_bytes, ("x",), 0.3
            ),
            "wgrad": Mode(
                (FUSED_WGRAD, CONV_WGRAD),
                cost.fused_flops,
                cost.fused_wgrad_bytes,
                ("weight", "bias"),
                0.3,
            ),
        },
        inputs=lambda s, make: formulas.fused_inputs(s, make),
        ours=lambda s, x, weight, bias: kernels.conv2d_relu_pool(x, weight, bias, s["padding"]),
        theirs=lambda s, *tensors: F.max_pool2d(formulas.conv_bias_relu(s, *tensors), 2),
        sweeps=(Sweep(seconds=35, shapes="vgg16@32", peers=_COMPILE, turn=2),),
    ),
    "conv2d_im2col": Operator(
        **_CONVOLUTIONS,
        lesson="im2col",
        layer=networks.convolution,
        modes={
            "fwd": Mode((MATMUL,), *_CONV),
            "dgrad": Mode((MATMUL,), *_DGRAD, wrt=("x",)),
            "wgrad": Mode((MATMUL,), *_CONV, wrt=("weight",)),
        },
        inputs=lambda s, make: formulas.conv_inputs(s, make),
        ours=lambda s, x, weight: kernels.conv2d_im2col(x, weight, None, *formulas.geometry(s)),
        theirs=lambda s, x, weight: F.conv2d(x, weight, None, *formulas.geometry(s)),
        peers=_with_inductor,
        sweeps=_COLUMNS["sweeps"],
    ),
    "im2col": Operator(
        **_COLUMNS,
        modes={
            "fwd": Mode(
                (TileOp("im2col", search_space.ROWS),),
                lambda s: 0,
                lambda s, e: e * (cost.read(s) + cost.columns(s)),
            )
        },
        inputs=lambda s, make: dict(x=make(s["N"], s["C"], s["H"], s["W"])),
        ours=lambda s, x: kernels.im2col(x, (s["R"], s["S"]), *formulas.geometry(s)),
        theirs=lambda s, x: formulas.columns(x, s),
    ),
    "col2im": Operator(
        **_COLUMNS,
        modes={
            "fwd": Mode(
                (TileOp("col2im", search_space.ROWS),),
                cost.columns,
                lambda s, e: e * (cost.columns(s) + cost.image(s)),
            )
        },
        inputs=lambda s, make: formulas.col2im_inputs(s, make),
        ours=lambda s, columns: kernels.col2im(
            columns, (s["N"], s["C"], s["H"], s["W"]), (s["R"], s["S"]), *formulas.geometry(s)
        ),
        theirs=lambda s, columns: formulas.fold(columns, s),
    ),
    "conv_stack": Operator(
        lesson="",
        sizes=("N", "H", "width"),
        default="vgg16@32",
        tiny=[(2, 37, 7)],
        implied={"H": 224, "width": 64},
        misfit=cost.stack_misfit,
        sets={"vgg16": lambda N: [Shape(f"vgg16.features n{N}", dict(N=N, H=224, width=64))]},
        modes={"step": Mode((), cost.stack_flops, cost.stack_bytes, misrouted=0.6)},
        product=True,
        layers=14,
        prepare=lambda *work: training.stack(*work),
        sweeps=(Sweep(seconds=60, shapes="vgg16@32,vgg16@256", peers=_COMPILE, turn=2),),
    ),
    "train_step": Operator(
        lesson="",
        sizes=("N",),
        default="demo",
        tiny=[(3,)],
        sets={"demo": lambda N: [Shape(f"demo n{N}", dict(N=N))]},
        modes={"step": Mode((), cost.train_step_flops, cost.train_step_bytes, misrouted=0.3)},
        peers=lambda w: ("torch", "graph", "compile"),
        product=True,
        layers=4,
        prepare=lambda *work: training.training_step(*work),
        sweeps=(
            Sweep("", 30, "demo@256,demo@1024,demo@4096", peers="torch,graph,compile", turn=2),
        ),
    ),
}


def tile_op(row: dict) -> TileOp:
    """Whose tile a results row's is: one of those of its operator's mode."""
    operator = OPERATORS.get(row["op"])
    mode = operator and operator.modes.get(row["mode"])
    name = row.get("tile_op")
    for known in mode.tile_ops if mode else ():
        if name in (None, known.name):
            return known
    return TileOp(name or row["op"], {})


def is_product(op: str) -> bool:
    """Whether an operator's speed is in FLOP/s, not in bytes/s."""
    return op in OPERATORS and OPERATORS[op].product

"""The calls whose kernels are compiled ahead of time, for GPUs that are not here.

A case is one call on empty tensors. It runs while `kernels._launch.record` lists what would be
launched. The cases are in groups, because a launch is held to the bars of its
group (compile_bars.py):

    default      every kernel with the tiles that a call takes by itself, forward and gradient
    tiles        every tile of every TILES list, with all kernels of its file
    matmul       its tiles, in the layouts of operands that each can take
    conv2d       its tiles, in the kinds of layers that each can take
    input grad   the tiles of conv2d's input gradient: each stride, with a ReLU and without
    weight grad  the tiles of its weight gradient: whole, in parts, with the bias gradient
    scaled       the tiles of scaled_matmul: the plainest epilogue, and scales, bias and ReLU
    activation   the TMA tiles of matmul, conv2d and scaled_matmul, and bias_relu's tiles: each
                 activation except ReLU
    memory       every tile of the kernels that the memory bounds
"""

import contextlib
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.tools.inputs import gradients
from tilelab import kernels
from tilelab.kernels import _launch, _tiles
from tilelab.kernels.activation import ACTIVATIONS
from tilelab.nets import step as training
from tilelab.perf.work.workloads import set_precision

GROUPS = (
    "default", "tiles", "matmul", "conv2d", "input grad", "weight grad", "scaled",
    "activation", "memory",
)  # fmt: skip
# Held with the oldest triton, too: the tiles of Hopper's kernels, and how wide memory is accessed.
CORE = GROUPS[2:]


class Case(NamedTuple):
    """One call, and which of its launches count.

    Attributes:
        group: the bars that its launches are held to.
        name: of the call, in words.
        dtype: of the operands; in "default" of the results, where the operands have 8 bits.
        call: makes the launches.
        tile: the tile that `ops` are forced to take; None for their defaults.
        ops: the names by which `choose_tile` knows them.
        precision: of float32 products, "ieee" or "tf32".
        module: the file of kernels/ whose launches count; "" for every launch.
    """

    group: str
    name: str
    dtype: torch.dtype
    call: Callable[[], Any]
    tile: dict | None = None
    ops: tuple[str, ...] = ()
    precision: str = "tf32"
    module: str = ""

    def events(self, device: _launch.Device) -> list:
        """What the call chooses and launches on such a device; nothing is launched."""
        set_precision(self.precision)
        with contextlib.ExitStack() as stack:
            for op in self.ops:
                stack.enter_context(_tiles.use_tile(op, self.tile))
            events = stack.enter_context(_launch.record(device))
            self.call()
        return events

    def launches(self, device: _launch.Device) -> list[_launch.Launch]:
        """Those of its launches that count."""
        launches = [e for e in self.events(device) if isinstance(e, _launch.Launch)]
        return [e for e in launches if self.module in ("", e.kernel.__module__.rpartition(".")[2])]


def cases(device: _launch.Device) -> list[Case]:
    """Every case for a device, in the order of GROUPS."""
    makers = (
        default_cases, tile_cases, matmul_cases, conv2d_cases, input_grad_cases, weight_grad_cases,
        scaled_cases, activation_cases, memory_cases,
    )  # fmt: skip
    return [case for make in makers for case in make(device)]


def lesson(name: str) -> Any:
    """A module of kernels/ (the functions hide some: `kernels.matmul` is one)."""
    return importlib.import_module(f"tilelab.kernels.{name}")


def train(fn, *inputs, **options):
    """Call `fn` and its backward."""
    y = fn(*inputs, **options)
    gradients(lambda *xs: fn(*xs, **options), inputs, torch.empty_like(y))


def images(*shape, dtype):
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


# --- default --------------------------------------------------------------------------------------


def scaled(operands, dtype, layout, activation="relu"):
    """With scales for each row and column, where the target has such operands."""
    a, b = (torch.empty(4096, 4096, dtype=operands) for _ in range(2))
    if operands == torch.float8_e4m3fn and _launch.device_of(a).capability < 89:
        return
    scales, bias = torch.empty(4096), torch.empty(4096, dtype=dtype)
    b = b.t() if layout == "NT" else b
    kernels.scaled_matmul(a, b, scales, scales, bias, activation, dtype)


def rung(tile, dtype, activation="relu"):
    """A convolution by a kernel that no call takes of itself, whose tile is for 16 bits."""
    if dtype.itemsize != 2:
        return
    x, weight = images(32, 128, 28, 28, dtype=dtype), images(256, 128, 3, 3, dtype=dtype)
    with _tiles.use_tile("conv2d", tile):
        kernels.conv2d(x, weight, torch.empty(256, dtype=dtype), padding=1, activation=activation)


def optimizer_step(optimizer, dtype, **options):
    p = torch.nn.Parameter(torch.empty(1000, dtype=dtype))
    p.grad = torch.empty_like(p)
    optimizer = optimizer([p], **options)
    optimizer.step()
    if dtype == torch.float32:  # of 16-bit copies
        optimizer.make_copies(torch.bfloat16)[p].grad = torch.empty(1000, dtype=torch.bfloat16)
        optimizer.step()


def training_step(dtype):
    """What nets/step.py adds to a network: it makes the batch, and records the step."""
    model = torch.nn.Linear(10, 10)
    images, labels = torch.zeros(64, 28, 28, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    made = training.TrainStep(
        model, kernels.SGD(model.parameters()), images, labels, 33.0, 78.0, 64, dtype
    )
    made.begin(torch.arange(64), torch.zeros(64, 2), torch.ones(1))
    logits = torch.empty(64, 10, dtype=dtype)
    learn, training.learn = training.learn, lambda *_: (logits, torch.empty(64))
    try:
        made.step()
    finally:
        training.learn = learn


# Calls that between them launch every kernel with every default tile: sizes that shrink none.
CALLS = {
    "matmul": lambda dtype, **epilogue: train(
        kernels.matmul,
        *(torch.empty(s, dtype=dtype) for s in [(512, 1024), (1024, 256), 256]),
        **epilogue,
    ),
    "matmul, few tiles": lambda dtype, **epilogue: train(  # where TMA is: K is split
        kernels.matmul,
        *(torch.empty(s, dtype=dtype) for s in [(128, 8192), (8192, 128), 128]),
        **epilogue,
    ),
    # Sizes of 1 are constants of a kernel of its own: here of the one that adds the parts up.
    "matmul, one column": lambda dtype: train(  # and its gradient one row
        lambda a, w, bias: kernels.matmul(a, w.t(), bias),
        *(torch.empty(s, dtype=dtype) for s in [(8192, 100), (1, 100), 1]),
    ),
    # `dtype` is the results'. The last one's operands are not what TMA takes.
    "scaled_matmul, float8": lambda dtype, **epilogue: scaled(
        torch.float8_e4m3fn, dtype, "NT", **epilogue
    ),
    "scaled_matmul, int8": lambda dtype, **epilogue: scaled(torch.int8, dtype, "NT", **epilogue),
    "scaled_matmul, row-major": lambda dtype, **epilogue: scaled(
        torch.int8, dtype, "NN", **epilogue
    ),
    "bias_relu": lambda dtype: train(
        kernels.bias_relu, images(64, 64, 28, 28, dtype=dtype), torch.empty(64, dtype=dtype)
    ),
    "conv2d": lambda dtype, **epilogue: train(
        kernels.conv2d,
        images(32, 128, 28, 28, dtype=dtype),
        images(256, 128, 3, 3, dtype=dtype),
        torch.empty(256, dtype=dtype),
        padding=1,
        **epilogue,
    ),
    "conv2d, few channels": lambda dtype, **epilogue: train(
        kernels.conv2d,
        images(32, 3, 112, 112, dtype=dtype),
        images(128, 3, 7, 7, dtype=dtype),
        stride=2,
        padding=3,
        **epilogue,
    ),
    # What TMA cannot read: one image for all; and few channels with gaps between the taps.
    "conv2d, by pointers": lambda dtype, **epilogue: kernels.conv2d(
        images(1, 128, 28, 28, dtype=dtype).expand(32, -1, -1, -1),
        images(256, 128, 3, 3, dtype=dtype),
        torch.empty(256, dtype=dtype),
        padding=1,
        **epilogue,
    ),
    "conv2d, few channels, by pointers": lambda dtype, **epilogue: kernels.conv2d(
        images(32, 3, 112, 112, dtype=dtype),
        images(128, 3, 7, 7, dtype=dtype),
        dilation=2,
        **epilogue,
    ),
    **{
        f"conv2d, {tile['kernel']}": lambda dtype, tile=tile, **epilogue: rung(
            tile, dtype, **epilogue
        )
        for tile in importlib.import_module("tilelab.kernels.conv2d").RUNGS
    },
    # Forward: its gradients are the general kernels', whose dx spills 16 bytes on sm_100 in TF32.
    "conv2d, depthwise": lambda dtype, activation="relu": kernels.conv2d(
        images(32, 128, 56, 56, dtype=dtype),
        torch.empty(128, 1, 3, 3, dtype=dtype),
        torch.empty(128, dtype=dtype),
        padding=1,
        groups=128,
        activation=activation,
    ),
    "conv2d, depthwise at stride 2": lambda dtype, **epilogue: kernels.conv2d(
        images(32, 32, 112, 112, dtype=dtype),
        torch.empty(32, 1, 3, 3, dtype=dtype),
        stride=2,
        padding=1,
        groups=32,
        **epilogue,
    ),
    **{
        f"conv2d, depthwise {R}x{R}": lambda dtype, R=R: kernels.conv2d(
            images(32, 128, 28, 28, dtype=dtype),
            torch.empty(128, 1, R, R, dtype=dtype),
            padding=R // 2,
            groups=128,
        )
        for R in (5, 7)
    },
    "conv2d_relu_pool": lambda dtype: train(
        kernels.conv2d_relu_pool,
        images(64, 128, 28, 28, dtype=dtype),
        images(128, 128, 3, 3, dtype=dtype),
        torch.empty(128, dtype=dtype),
        padding=1,
    ),
    "conv2d_relu_pool, by pointers": lambda dtype: kernels.conv2d_relu_pool(
        images(1, 128, 28, 28, dtype=dtype).expand(64, -1, -1, -1),
        images(128, 128, 3, 3, dtype=dtype),
        torch.empty(128, dtype=dtype),
        padding=1,
    ),
    "conv2d_relu_pool, few channels": lambda dtype: train(
        kernels.conv2d_relu_pool,
        images(64, 16, 28, 28, dtype=dtype),
        images(128, 16, 3, 3, dtype=dtype),
        torch.empty(128, dtype=dtype),
        padding=1,
    ),
    "conv2d_relu_pool, first layer": lambda dtype: train(
        kernels.conv2d_relu_pool,
        images(64, 1, 28, 28, dtype=dtype),
        images(16, 1, 3, 3, dtype=dtype),
        torch.empty(16, dtype=dtype),
    ),
    "conv2d_im2col": lambda dtype: train(
        kernels.conv2d_im2col,
        images(32, 64, 28, 28, dtype=dtype),
        images(64, 64, 3, 3, dtype=dtype),
        torch.empty(64, dtype=dtype),
        padding=1,
    ),
    "max_pool2d": lambda dtype: train(
        kernels.max_pool2d, images(32, 64, 56, 56, dtype=dtype), kernel_size=3, stride=2, padding=1
    ),
    **{
        f"softmax of {n}": lambda dtype, n=n: train(
            kernels.softmax, torch.empty(512, n, dtype=dtype)
        )
        for n in (10, 100, 1000, 4000, 16_000, 50_257)
    },
    "softmax, strided": lambda dtype: train(
        kernels.softmax, torch.empty(8, 64, 56, 56, dtype=dtype), dim=1
    ),
    **{
        f"cross_entropy of {n}": lambda dtype, n=n: train(
            kernels.cross_entropy,
            torch.empty(512, n, dtype=dtype),
            torch.zeros(512, dtype=torch.int64),
        )
        for n in (10, 100, 1000, 4000, 16_000, 50_257)
    },
    "SGD": lambda dtype: optimizer_step(kernels.SGD, dtype, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda dtype: optimizer_step(kernels.AdamW, dtype),
    "AdamW, counting on the GPU": lambda dtype: optimizer_step(
        kernels.AdamW, dtype, lr=torch.tensor(0.1), capturable=True
    ),
    "training step": training_step,
}


ACTIVATED = (  # the calls that end in an activation
    "matmul", "matmul, few tiles", "scaled_matmul, float8", "scaled_matmul, int8",
    "scaled_matmul, row-major", "conv2d", "conv2d, few channels", "conv2d, by pointers",
    "conv2d, few channels, by pointers", "conv2d, direct", "conv2d, flat", "conv2d, depthwise",
    "conv2d, depthwise at stride 2",
)  # fmt: skip


def default_cases(device):
    """In bfloat16 and float32, the products in full and in TF32; and with every activation."""
    half, full = (torch.bfloat16, "ieee"), (torch.float32, "ieee")
    for name, call in CALLS.items():
        for dtype, precision in half, full, (torch.float32, "tf32"):
            yield Case("default", name, dtype, functools.partial(call, dtype), precision=precision)
    for name, activation in itertools.product(ACTIVATED, ACTIVATIONS):
        for dtype, precision in half, full:
            call = functools.partial(CALLS[name], dtype, activation=activation)
            yield Case("default", f"{name}, {activation}", dtype, call, precision=precision)


# --- tiles ----------------------------------------------------------------------------------------


def chosen_by(module, events):
    """The names under which the kernels of `module` were given tiles like those of its TILES."""
    names, pending = set(), []
    for event in events:
        if isinstance(event, _launch.Choice) and event.op != "matmul_reduce":  # no BLOCK_K
            pending.append(event.op)
        elif pending:
            if event.kernel.__module__.removesuffix("_tma") == module.__name__:
                names.add(pending[-1])
            pending = []
    return names


def tile_cases(device):
    """In bfloat16 for Hopper: the calls above that choose a tile for a kernel of the file."""
    if device.capability != 90:
        return
    defaults = [case for case in default_cases(device) if case.dtype == torch.bfloat16]
    defaults = [case for case in defaults if case.name in CALLS]
    events = [(case, case.events(device)) for case in defaults]
    for module in modules():
        used = {case.name: (case, chosen_by(module, found)) for case, found in events}
        used = {name: (case, names) for name, (case, names) in used.items() if names}
        ops = tuple(sorted(set().union(*(names for _, names in used.values()))))
        file = module.__name__.rpartition(".")[2]
        for tile in getattr(module, "TILES", []):
            for case, _ in used.values():
                yield case._replace(group="tiles", tile=tile, ops=ops, module=file)


def modules():
    """Every module of kernels/."""
    return [lesson(m.name) for m in pkgutil.iter_modules(kernels.__path__)]


TMA_ONLY = {  # the kernels that a GPU without TMA has no use for
    "matmul_tma_kernel", "scaled_matmul_tma_kernel",
    "conv2d_tma_kernel", "conv2d_pack_kernel", "conv2d_pack_filter_kernel",
    "conv2d_input_grad_tma_kernel", "conv2d_unfold_kernel", "conv2d_weight_grad_tma_kernel",
}  # fmt: skip


# --- matmul ---------------------------------------------------------------------------------------


def fits(tile, shared):
    """Whether the steps under way of a 16-bit tile take at most so many bytes of shared memory."""
    step = (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * 2
    return step * (tile["num_stages"] - 1) <= shared


def is_small(tile):
    """Whether its kernel for TMA also adds a part of the sum alone."""
    return tile["kernel"] == "tma" and tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128


def matmul(layout, dtype, activation="relu"):
    """With bias and activation; "T" is for a transposed operand."""
    a, b = (torch.empty(4096, 4096, dtype=dtype) for _ in range(2))
    a, b = a.t() if layout[0] == "T" else a, b.t() if layout[1] == "T" else b
    kernels.matmul(a, b, torch.empty(4096, dtype=dtype), activation)


def matmul_cases(device):
    """Its tiles, in the layouts that each can take.

    The small ones of FAST_TILES are also compiled with K split, in the layout whose loop is the
    longest; and the 16-bit ones in fp16, which has the same instructions, in the plain layout.
    """
    half, full = torch.bfloat16, torch.float32
    # AMD's have 64 KiB of shared memory: tiles of more steps are for the others.
    tiles = [tile for tile in lesson("matmul").TILES if device.capability or fits(tile, 64 * 1024)]
    jobs = [(half, x, tile) for tile in tiles for x in ("NN", "NT", "TN")]
    for tile in lesson("matmul_tma").FAST_TILES[2]:
        jobs += [(half, layout, tile) for layout in ("NN", "NT", "TN", "TT")]
        jobs += [(half, "TN", tile | dict(SPLIT_K=4))] if is_small(tile) else []
        jobs += [(torch.float16, "NN", tile)]
    jobs += [(full, "NT", tile) for tile in lesson("matmul_tma").FAST_TILES[4]]
    for dtype, layout, tile in jobs:
        if tile.get("kernel", "pointer") in device.kernels:
            call = functools.partial(matmul, layout, dtype)
            yield Case("matmul", layout, dtype, call, tile, ("matmul",))


# --- conv2d ---------------------------------------------------------------------------------------

LAYERS = {  # x, weight, stride, padding and groups; None for a max-pool in place of them
    "3x3": ((64, 128, 28, 28), (256, 128, 3, 3), 1, 1, 1),
    "3x3 at stride 2": ((64, 128, 28, 28), (256, 128, 3, 3), 2, 1, 1),
    "4 groups": ((64, 256, 28, 28), (256, 64, 3, 3), 1, 1, 4),
    "32 groups of 4, stride 2": ((64, 128, 28, 28), (128, 4, 3, 3), 2, 1, 32),
    "stem": ((64, 3, 112, 112), (128, 3, 7, 7), 2, 3, 1),
    "stem of patches": ((64, 3, 224, 224), (128, 3, 16, 16), 16, 0, 1),
    "pool of 28x28": ((64, 128, 28, 28), (256, 128, 3, 3), None, 1, 1),
    "pool of 14x14": ((64, 128, 14, 14), (256, 128, 3, 3), None, 1, 1),
}


def conv2d(layer, dtype, activation="relu"):
    """With bias and activation, or a ReLU and a max-pool."""
    x, weight, stride, padding, groups = LAYERS[layer]
    x, bias = images(*x, dtype=dtype), torch.empty(weight[0], dtype=dtype)
    weight = images(*weight, dtype=dtype)
    if stride is None:
        kernels.conv2d_relu_pool(x, weight, bias, padding)
    else:
        kernels.conv2d(x, weight, bias, stride, padding, 1, groups, activation)


def conv2d_cases(device):
    """Its tiles, in the layers that each can take.

    The small ones of FAST_TILES are also compiled with the sum split; the 16-bit ones in fp16,
    which has the same instructions, in the plain layer; the portable kernel's in that one alone.
    """
    half, full = torch.bfloat16, torch.float32
    portable, fast = lesson("conv2d"), lesson("conv2d_tma").FAST_TILES
    jobs = [(half, "3x3", tile) for tile in portable.TILES + portable.RUNGS]
    shallow = [tile for tile in portable.TILES if tile["BLOCK_K"] == 16]  # of 4 elements a thread
    jobs += [(full, "3x3", tile) for tile in shallow]
    if "tma" in device.kernels:
        for tile in fast[2]:
            narrow = tile["BLOCK_N"] == 64
            jobs += [(half, name, tile) for name in LAYERS if narrow or "groups" not in name]
            jobs += [(half, "3x3 at stride 2", tile | dict(SPLIT_K=4))] if is_small(tile) else []
            jobs += [(torch.float16, "3x3", tile)]
        layers = ("3x3", "3x3 at stride 2", "pool of 28x28")
        jobs += [(full, layer, tile) for tile in fast[4] for layer in layers]
    ops = ("conv2d", "conv2d_flat", "conv2d_grouped", "conv2d_relu_pool")
    for dtype, layer, tile in jobs:
        call = functools.partial(conv2d, layer, dtype)
        yield Case("conv2d", layer, dtype, call, tile, ops)


# --- conv2d's gradients ---------------------------------------------------------------------------


def input_grad(dtype, stride, relu, packed):
    x, dy = (images(64, c, 28 // s, 28 // s, dtype=dtype) for c, s in [(128, 1), (256, stride)])
    weight = images(256, 128, 3, 3, dtype=dtype)
    weight = weight.contiguous() if packed else weight
    geometry = [stride, stride], [1, 1], [1, 1], 1
    if relu:
        lesson("conv2d_input_grad").conv2d_input_grad_relu(dy, weight, x, *geometry)
    else:
        lesson("conv2d_input_grad").conv2d_input_grad(dy, weight, list(x.shape), *geometry)


def input_grad_cases(device):
    """In the plain layer also in fp16, with filters that are packed, and with the sum split."""
    jobs = []
    for item, tiles in lesson("conv2d_tma").FAST_TILES.items():
        dtype = torch.bfloat16 if item == 2 else torch.float32
        for tile in tiles if "tma" in device.kernels else []:
            jobs += [(dtype, stride, False, False, tile) for stride in (1, 2)]
            if is_small(tile) or item == 2:  # or the box of x does not fit
                jobs += [(dtype, stride, True, False, tile) for stride in (1, 2)]
            if item == 2:
                jobs += [(torch.float16, 1, False, False, tile), (dtype, 1, False, True, tile)]
                split = tile | dict(SPLIT_K=4)
                jobs += [(dtype, 1, False, False, split)] if is_small(tile) else []
    for dtype, stride, relu, packed, tile in jobs:
        name = f"stride {stride}" + " through a ReLU" * relu + ", packed" * packed
        call = functools.partial(input_grad, dtype, stride, relu, packed)
        op = "conv2d_input_grad_relu" if relu else "conv2d_input_grad"
        yield Case("input grad", name, dtype, call, tile, (op,))


WEIGHT_LAYERS = {  # x, weight, stride and padding
    "3x3": ((64, 128, 28, 28), (256, 128, 3, 3), 1, 1),
    "3x3 at stride 2": ((64, 128, 28, 28), (256, 128, 3, 3), 2, 1),
    "1x1": ((64, 256, 28, 28), (256, 256, 1, 1), 1, 0),
    "64 channels": ((64, 64, 28, 28), (64, 64, 3, 3), 1, 1),
    "64 channels, 128 filters": ((64, 64, 28, 28), (128, 64, 3, 3), 1, 1),
    "stem": ((64, 3, 112, 112), (64, 3, 7, 7), 2, 3),
    "stem of stride 1": ((64, 3, 112, 112), (64, 3, 3, 3), 1, 1),
    "16 channels": ((64, 16, 28, 28), (32, 16, 3, 3), 1, 0),
}


def weight_grad(layer, dtype, bias):
    grads = lesson("conv2d_weight_grad")
    x, weight, stride, padding = WEIGHT_LAYERS[layer]
    x, weight = images(*x, dtype=dtype), images(*weight, dtype=dtype)
    (N, _, H, W), (K, _, R, S) = x.shape, weight.shape
    P, Q = ((n + 2 * padding - taps) // stride + 1 for n, taps in ((H, R), (W, S)))
    fn = grads.conv2d_weight_bias_grad if bias else grads.conv2d_weight_grad
    dy = images(N, K, P, Q, dtype=dtype)
    fn(x, dy, weight, [stride] * 2, [padding] * 2, [1, 1], 1)


def weight_grad_cases(device):
    """In parts the result is float32, and needs more room. Few channels go through registers."""
    if "tma" not in device.kernels:
        return
    half, tiles = torch.bfloat16, lesson("conv2d_weight_grad_tma").FAST_TILES[2]
    jobs = [(torch.float16, "3x3", tiles[0], False)]
    if device.capability != 90:
        tiles = [tile for tile in tiles if tile["BLOCK_K"] == 64]  # the others are alike
    for tile in tiles:
        parts = tile | dict(SPLIT_K=4)
        jobs += [
            (half, "3x3", tile, False),
            (half, "3x3 at stride 2", parts, True),
            (half, "stem", parts, False),
            (half, "16 channels", tile, True),
        ]
        if tile["BLOCK_M"] == 64:
            jobs += [(half, "1x1", parts, False), (half, "stem of stride 1", parts, True)]
        if tile["BLOCK_N"] == 256:  # pixels are columns
            jobs += [
                (half, "64 channels", tile, False),
                (half, "64 channels", parts, True),
                (half, "64 channels, 128 filters", parts, True),
            ]
    for dtype, layer, tile, bias in jobs:
        call, module = functools.partial(weight_grad, layer, dtype, bias), "conv2d_weight_grad_tma"
        name = layer + " with the bias gradient" * bias
        yield Case("weight grad", name, dtype, call, tile, ("conv2d_weight_grad",), module=module)


# --- scaled_matmul --------------------------------------------------------------------------------


EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)


def scaled_matmul(operands, dtype, activation):
    """With one scale for each row and column, bias and activation; or of None, two scales alone."""
    a, b = (torch.empty(4096, 4096, dtype=operands) for _ in range(2))
    each, one = torch.empty(4096), torch.empty(())
    rest = (each, each, each.to(dtype), activation) if activation else (one, one, None, None)
    kernels.scaled_matmul(a, b.t(), *rest, dtype)


def scaled_cases(device):
    """FAST_TILES with both kinds of operands, and results of 16 and of 32 bits."""
    ends = (torch.bfloat16, None), (torch.bfloat16, "relu"), (torch.float32, "relu")
    for operands, (dtype, activation) in itertools.product(EIGHT_BIT, ends):
        for tile in lesson("scaled_matmul").FAST_TILES[1] if device.capability == 90 else []:
            name = f"to {str(dtype)[6:]}" + " with scales, bias and ReLU" * bool(activation)
            call = functools.partial(scaled_matmul, operands, dtype, activation)
            yield Case("scaled", name, operands, call, tile, ("scaled_matmul",))


# --- activations ----------------------------------------------------------------------------------


def bias_activation(dtype, activation):
    x, bias = images(64, 64, 56, 56, dtype=dtype), torch.empty(64, dtype=dtype)
    train(kernels.bias_activation, x, bias, activation=activation)


def activation_cases(device):
    """Tiles with the sum whole, in the activations that no case above has."""
    others = [name for name in ACTIVATIONS if name != "relu"] if device.capability == 90 else []
    half, full = torch.bfloat16, torch.float32
    for activation in others:
        jobs = []
        for dtype in half, full:
            call = functools.partial(matmul, "NT", dtype, activation)
            jobs += [(call, dtype, "matmul", lesson("matmul_tma").FAST_TILES[dtype.itemsize])]
            call = functools.partial(conv2d, "3x3", dtype, activation)
            jobs += [(call, dtype, "conv2d", lesson("conv2d_tma").FAST_TILES[dtype.itemsize])]
            call = functools.partial(bias_activation, dtype, activation)
            jobs += [(call, dtype, "bias_relu", lesson("bias_relu").TILES)]
        for operands in EIGHT_BIT:
            call = functools.partial(scaled_matmul, operands, half, activation)
            jobs += [(call, operands, "scaled_matmul", lesson("scaled_matmul").FAST_TILES[1])]
        for call, dtype, op, tiles in jobs:
            name = f"{op}, {activation}"
            for tile in tiles:
                yield Case("activation", name, dtype, call, tile, (op, f"{op}_backward"))


# --- what the memory bounds -----------------------------------------------------------------------

ROWS = 4096


def logits(n, dtype):
    return torch.empty(ROWS, n, dtype=dtype)


def rows_for(tile):
    """How long the rows are that a tile is for: as it, or several of its blocks if it is online."""
    online = tile == lesson("softmax").ONLINE
    return tile["BLOCK_N"] * (5 if online else 1) - 16


def softmax(tile, dtype):
    if tile == lesson("softmax").STRIDED:
        return train(kernels.softmax, torch.empty(8, 64, 56, 56, dtype=dtype), dim=1)
    return train(kernels.softmax, logits(rows_for(tile), dtype))


def cross_entropy(tile, dtype):
    if tile == lesson("softmax").STRIDED:
        x, t = torch.empty(8, 64, 56, 56, dtype=dtype), torch.zeros(8, 56, 56, dtype=torch.int64)
    else:
        x, t = logits(rows_for(tile), dtype), torch.zeros(ROWS, dtype=torch.int64)
    return train(kernels.cross_entropy, x, t)


def bias_relu(tile, dtype):
    C = max(64, tile["BLOCK_N"]) if tile["BLOCK_N"] > 16 else 16
    bias = torch.empty(C, dtype=dtype)
    train(kernels.bias_relu, images(64, C, 56, 56, dtype=dtype), bias)
    train(kernels.bias_relu, torch.empty(ROWS, C, dtype=dtype), bias)
    if tile["BLOCK_M"] >= 16:  # or a tile has fewer pixels side by side than a load could hold
        train(kernels.bias_relu, torch.empty(64, C, 56, 56, dtype=dtype), bias)


def max_pool2d(tile, dtype, **window):
    C = max(64, tile["BLOCK_N"]) if tile["BLOCK_N"] > 16 else 16
    train(kernels.max_pool2d, images(32, C, 56, 56, dtype=dtype), **window)


def step(optimizer, dtype, **options):
    p = torch.nn.Parameter(torch.empty(2**20, dtype=dtype))
    p.grad = torch.empty_like(p)
    optimizer([p], **options).step()


def step_of_copies(optimizer, dtype, **options):
    """In a network that computes in `dtype`, with parameters in float32, in a CUDA graph."""
    p = torch.nn.Parameter(torch.empty(2**20))
    optimizer = optimizer([p], lr=torch.tensor(0.1), **options)
    optimizer.make_copies(dtype)[p].grad = torch.empty(2**20, dtype=dtype)
    optimizer.step()


def im2col(tile, dtype):
    x = images(32, 64, 28, 28, dtype=dtype)
    train(kernels.im2col, x, kernel_size=3, padding=1)


def depthwise(tile, dtype, stride=1):
    """Without a gradient: that of a depthwise convolution is not bound by memory yet."""
    C = max(64, tile["BLOCK_N"]) if tile["BLOCK_N"] > 32 else 32
    x, weight = images(256, C, 112, 112, dtype=dtype), torch.empty(C, 1, 3, 3, dtype=dtype)
    kernels.conv2d(x, weight, torch.empty(C, dtype=dtype), stride, 1, 1, C, "relu")


def unpool(tile, dtype):
    """By the bias gradient alone: nothing is multiplied. 57 rows: the last has no window."""
    K = max(64, tile["BLOCK_N"])
    dy, place = images(64, K, 28, 28, dtype=dtype), images(64, K, 28, 28, dtype=torch.uint8)
    weight = images(K, 64, 3, 3, dtype=dtype)
    geometry = [64, 64, 57, 56], [1, 1], [False, False, True], False
    torch.ops.tilelab.conv2d_relu_pool_backward(dy, place, None, weight, *geometry)


# By name: the file whose tiles are tried, whose they are, and a call that launches its kernels.
MEMORY_CALLS = {
    "bias_relu": ("bias_relu", ("bias_relu", "bias_relu_backward"), bias_relu),
    "softmax": ("softmax", ("softmax", "softmax_backward"), softmax),
    "cross_entropy": ("softmax", ("cross_entropy", "cross_entropy_backward"), cross_entropy),
    "max_pool2d, 2x2": (
        "pool",
        ("max_pool2d", "max_pool2d_backward"),
        lambda tile, dtype: max_pool2d(tile, dtype, kernel_size=2),
    ),
    "max_pool2d, 3x3 at stride 2": (
        "pool",
        ("max_pool2d", "max_pool2d_backward"),
        lambda tile, dtype: max_pool2d(tile, dtype, kernel_size=3, stride=2, padding=1),
    ),
    "conv2d_relu_pool's scatter": ("conv2d_relu_pool_grad", ("unpool",), unpool),
    "SGD": ("optim", ("sgd",), lambda tile, dtype: step(kernels.SGD, dtype, momentum=0.9)),
    "AdamW": ("optim", ("adamw",), lambda tile, dtype: step(kernels.AdamW, dtype)),
    "SGD of copies": (
        "optim",
        ("sgd",),
        lambda tile, dtype: step_of_copies(kernels.SGD, dtype, momentum=0.9),
    ),
    "AdamW of copies": (
        "optim",
        ("adamw",),
        lambda tile, dtype: step_of_copies(kernels.AdamW, dtype, capturable=True),
    ),
    "im2col": ("im2col", ("im2col", "col2im"), im2col),
    "conv2d, depthwise": ("conv2d_depthwise", ("conv2d_depthwise",), depthwise),
    "conv2d, depthwise at stride 2": (
        "conv2d_depthwise",
        ("conv2d_depthwise",),
        lambda tile, dtype: depthwise(tile, dtype, stride=2),
    ),
}


def memory_cases(device):
    """For Hopper, in every dtype. Only loads and stores of whole tiles matter, see `accesses`."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if device.capability == 90 else ():
        for name, (file, ops, call) in MEMORY_CALLS.items():
            for tile in getattr(lesson(file), "UNPOOL_TILES", lesson(file).TILES):
                yield Case("memory", name, dtype, functools.partial(call, tile, dtype), tile, ops)

"""Compile every kernel for GPUs that are not here, and report what came of it as JSON.

    TRITON_INTERPRET=0 python -m tests.tools.aot sm_90                 each kernel at its default tiles
    TRITON_INTERPRET=0 python -m tests.tools.aot sm_90 --tiles         every tile of every TILES list
    TRITON_INTERPRET=0 python -m tests.tools.aot sm_90 --matmul        matmul's tiles, in every layout
    TRITON_INTERPRET=0 python -m tests.tools.aot sm_90 --conv2d        conv2d's, in every kind of layer
    TRITON_INTERPRET=0 python -m tests.tools.aot sm_90 --input-grad    those of its input gradient
    TRITON_INTERPRET=0 python -m tests.tools.aot sm_90 --weight-grad   and those of its weight gradient

test_compile.py runs this in processes of its own, because a process has to choose between compiler
and interpreter before it imports triton. How a call becomes something to compile, and what is read
off the machine code, is perf/compiler/aot.py; here are the calls that between them reach every kernel.

The report is a JSON object: "launches" (a list of what `compile_launch` returns) and "missing" (the
names of kernels that no case launches).
"""

import contextlib
import importlib
import json
import pkgutil
import re
import sys

import torch
import triton
from tilelab.kernels import _launch, _tiles
from tilelab.nets import step as training
from tilelab.perf.compiler import aot
from tilelab.perf.work.workloads import set_precision

from tests.tools.inputs import gradients
from tilelab import kernels

TENSOR_CORES = (
    r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"  # in PTX, and in AMD's assembly
)
BFLOAT16 = [(torch.bfloat16, "ieee")]  # with the precision of float32 products
FLOAT32 = [(torch.float32, "ieee"), (torch.float32, "tf32")]


def train(fn, *inputs, **options):
    """Call `fn` and its backward."""
    y = fn(*inputs, **options)
    gradients(lambda *xs: fn(*xs, **options), inputs, torch.empty_like(y))


def images(*shape, dtype):
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def scaled(operands, dtype, layout):
    """With scales for each row and column, where the target has such operands."""
    if operands == torch.float8_e4m3fn and DEVICE.capability < 89:
        return
    a, b = (torch.empty(4096, 4096, dtype=operands) for _ in range(2))
    scales, bias = torch.empty(4096), torch.empty(4096, dtype=dtype)
    b = b.t() if layout == "NT" else b
    kernels.scaled_matmul(a, b, scales, scales, bias, "relu", dtype)


def rung(tile, dtype):
    """A convolution by a kernel that no call takes of itself, whose tile is for 16 bits."""
    if dtype.itemsize != 2:
        return
    x, weight = images(32, 128, 28, 28, dtype=dtype), images(256, 128, 3, 3, dtype=dtype)
    with _tiles.use_tile("conv2d", tile):
        kernels.conv2d(x, weight, torch.empty(256, dtype=dtype), padding=1, activation="relu")


def step(optimizer, dtype, **options):
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


DEVICE = _launch.ANY_GPU  # that the calls pretend to run on; set below

# Calls that between them launch every kernel with every default tile: sizes that shrink none.
CASES = {
    "matmul": lambda dtype: train(
        kernels.matmul, *(torch.empty(s, dtype=dtype) for s in [(512, 1024), (1024, 256), 256])
    ),
    "matmul, few tiles": lambda dtype: train(  # where TMA is: K is split
        kernels.matmul, *(torch.empty(s, dtype=dtype) for s in [(128, 8192), (8192, 128), 128])
    ),
    # Sizes of 1 are constants of a kernel of its own: here of the one that adds the parts up.
    "matmul, one column": lambda dtype: train(  # and its gradient one row
        lambda a, w, bias: kernels.matmul(a, w.t(), bias),
        *(torch.empty(s, dtype=dtype) for s in [(8192, 100), (1, 100), 1]),
    ),
    # `dtype` is the results'. The last one's operands are not what TMA takes.
    "scaled_matmul, float8": lambda dtype: scaled(torch.float8_e4m3fn, dtype, "NT"),
    "scaled_matmul, int8": lambda dtype: scaled(torch.int8, dtype, "NT"),
    "scaled_matmul, row-major": lambda dtype: scaled(torch.int8, dtype, "NN"),
    "bias_relu": lambda dtype: train(
        kernels.bias_relu, images(64, 64, 28, 28, dtype=dtype), torch.empty(64, dtype=dtype)
    ),
    "conv2d": lambda dtype: train(
        kernels.conv2d,
        images(32, 128, 28, 28, dtype=dtype),
        images(256, 128, 3, 3, dtype=dtype),
        torch.empty(256, dtype=dtype),
        padding=1,
    ),
    "conv2d, few channels": lambda dtype: train(
        kernels.conv2d,
        images(32, 3, 112, 112, dtype=dtype),
        images(128, 3, 7, 7, dtype=dtype),
        stride=2,
        padding=3,
    ),
    # What TMA cannot read: one image for all; and few channels with gaps between the taps.
    "conv2d, by pointers": lambda dtype: kernels.conv2d(
        images(1, 128, 28, 28, dtype=dtype).expand(32, -1, -1, -1),
        images(256, 128, 3, 3, dtype=dtype),
        torch.empty(256, dtype=dtype),
        padding=1,
    ),
    "conv2d, few channels, by pointers": lambda dtype: kernels.conv2d(
        images(32, 3, 112, 112, dtype=dtype),
        images(128, 3, 7, 7, dtype=dtype),
        dilation=2,
    ),
    **{
        f"conv2d, {tile['kernel']}": lambda dtype, tile=tile: rung(tile, dtype)
        for tile in importlib.import_module("tilelab.kernels.conv2d").RUNGS
    },
    # Forward: its gradients are the general kernels', whose dx spills 16 bytes on sm_100 in TF32.
    "conv2d, depthwise": lambda dtype: kernels.conv2d(
        images(32, 128, 56, 56, dtype=dtype),
        torch.empty(128, 1, 3, 3, dtype=dtype),
        torch.empty(128, dtype=dtype),
        padding=1,
        groups=128,
        activation="relu",
    ),
    "conv2d, depthwise at stride 2": lambda dtype: kernels.conv2d(
        images(32, 32, 112, 112, dtype=dtype),
        torch.empty(32, 1, 3, 3, dtype=dtype),
        stride=2,
        padding=1,
        groups=32,
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
            kernels.softmax, torch.empty(4096, n, dtype=dtype)
        )
        for n in (10, 100, 1000, 4000, 16_000, 50_257)
    },
    "softmax, strided": lambda dtype: train(
        kernels.softmax, torch.empty(8, 64, 56, 56, dtype=dtype), dim=1
    ),
    **{
        f"cross_entropy of {n}": lambda dtype, n=n: train(
            kernels.cross_entropy,
            torch.empty(4096, n, dtype=dtype),
            torch.zeros(4096, dtype=torch.int64),
        )
        for n in (10, 100, 1000, 4000, 16_000, 50_257)
    },
    "SGD": lambda dtype: step(kernels.SGD, dtype, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda dtype: step(kernels.AdamW, dtype),
    "AdamW, counting on the GPU": lambda dtype: step(
        kernels.AdamW, dtype, lr=torch.tensor(0.1), capturable=True
    ),
    "training step": training_step,
}


def record(case, dtype):
    """What one case chooses and launches; nothing is launched."""
    with _launch.record(DEVICE) as events:
        CASES[case](dtype)
    return events


def compile_launch(launch):
    """Compile, and return what a test wants to know; {"error": ...} where it does not compile."""
    kernel = launch.kernel
    row = dict(kernel=kernel.__name__)
    row["constants"] = {k: v for k, v in launch.meta.items() if k in kernel.arg_names}
    row["options"] = {k: v for k, v in launch.meta.items() if k not in kernel.arg_names}
    try:
        compiled = aot.compile_launch(launch)
    except Exception as e:
        return row | {"error": f"{type(e).__name__}: {e}"[:2000], "hash": None}
    row |= aot.analyse(compiled)
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    row["tensor_cores"] = sorted(set(re.findall(TENSOR_CORES, assembly)))
    row["dots"] = compiled.asm["ttir"].count("tt.dot ")
    before, _, last = compiled.asm["ttgir"].rpartition("scf.for")  # the innermost, or the last one
    row["ahead"] = "async_tma_copy_global_to_local" in before  # loads of TMA for later steps
    row["waits"] = "init_barrier" in last.partition("scf.yield")[0]  # for each load as it asks
    return row | {"hash": compiled.hash}


def report(dtypes, cases=CASES, only=None, tile=None):
    """Compile what the cases launch (of the kernels of module `only`), each kernel once."""
    rows, seen = [], set()
    for case in cases:
        for dtype, precision in dtypes:
            set_precision(precision)
            for launch in record(case, dtype):
                if not isinstance(launch, _launch.Launch):
                    continue
                if only not in (None, launch.kernel.__module__):
                    continue
                row = compile_launch(launch)
                if row["hash"] is None or row["hash"] not in seen:
                    seen.add(row["hash"])
                    rows.append({"case": case, "dtype": str(dtype)[6:], "tile": tile} | row)
    return rows


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


def report_tiles():
    """The same in bfloat16 for every tile of every TILES list, with all kernels of its file."""
    rows = []
    events = {case: record(case, torch.bfloat16) for case in CASES}
    for module in modules():
        used = {case: names for case in CASES if (names := chosen_by(module, events[case]))}
        for tile in getattr(module, "TILES", []):
            with contextlib.ExitStack() as stack:
                for name in set().union(*used.values()):
                    stack.enter_context(_tiles.use_tile(name, tile))
                rows += report(BFLOAT16, used, module.__name__, tile)
    return rows


def report_matmul():
    """matmul's tiles, in the layouts of operands that each can take, with bias and ReLU.

    Those of FAST_TILES that are small enough for it with K split, too, in the layout whose loop is
    the longest; and in fp16, which has the same instructions, in the plain one.
    """
    lesson = importlib.import_module("tilelab.kernels.matmul")
    fast = importlib.import_module("tilelab.kernels.matmul_tma").FAST_TILES
    set_precision("tf32")
    jobs = [(torch.bfloat16, x, tile) for tile in lesson.TILES for x in ("NN", "NT", "TN")]
    for item, layouts in {2: ["NN", "NT", "TN", "TT"], 4: ["NT"]}.items():
        for tile in fast[item]:
            small = tile["kernel"] == "tma" and tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128
            dtype = torch.bfloat16 if item == 2 else torch.float32
            jobs += [(dtype, layout, tile) for layout in layouts]
            jobs += [(dtype, "TN", tile | dict(SPLIT_K=4))] if small and item == 2 else []
            jobs += [(torch.float16, "NN", tile)] if item == 2 else []
    rows = []
    for dtype, layout, tile in jobs:
        if tile.get("kernel", "pointer") not in DEVICE.kernels:
            continue
        a, b = (torch.empty(4096, 4096, dtype=dtype) for _ in range(2))
        a, b = a.t() if layout[0] == "T" else a, b.t() if layout[1] == "T" else b
        with _tiles.use_tile("matmul", tile), _launch.record(DEVICE) as events:
            kernels.matmul(a, b, torch.empty(4096, dtype=dtype), "relu")
        about = {"case": layout, "dtype": str(dtype)[6:], "tile": tile}
        launches = [event for event in events if isinstance(event, _launch.Launch)]
        rows += [about | compile_launch(launch) for launch in launches]
    return rows


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


def report_conv2d():
    """conv2d's tiles in the layers that each can take, with bias and ReLU.

    Those of FAST_TILES that are small enough for it with the sum split, too; and in fp16, which has
    the same instructions, in the plain layer. The portable kernel's in that one alone.
    """
    portable = importlib.import_module("tilelab.kernels.conv2d")
    fast = importlib.import_module("tilelab.kernels.conv2d_tma").FAST_TILES
    set_precision("tf32")
    jobs = [(torch.bfloat16, "3x3", tile) for tile in portable.TILES + portable.RUNGS]
    shallow = [tile for tile in portable.TILES if tile["BLOCK_K"] == 16]  # of 4 elements a thread
    jobs += [(torch.float32, "3x3", tile) for tile in shallow]
    for item, layers in {2: list(LAYERS), 4: ["3x3", "3x3 at stride 2", "pool of 28x28"]}.items():
        dtype = torch.bfloat16 if item == 2 else torch.float32
        for tile in fast[item] if "tma" in DEVICE.kernels else []:
            jobs += [
                (dtype, layer, tile)
                for layer in layers
                if tile["BLOCK_N"] == 64 or "groups" not in layer
            ]
            if item == 2 and tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128:
                jobs.append((dtype, "3x3 at stride 2", tile | dict(SPLIT_K=4)))
            jobs += [(torch.float16, "3x3", tile)] if item == 2 else []
    rows = []
    for dtype, layer, tile in jobs:
        x, weight, stride, padding, groups = LAYERS[layer]
        inputs = images(*x, dtype=dtype), images(*weight, dtype=dtype)
        inputs += (torch.empty(weight[0], dtype=dtype),)
        with contextlib.ExitStack() as stack:
            for name in ("conv2d", "conv2d_flat", "conv2d_grouped", "conv2d_relu_pool"):
                stack.enter_context(_tiles.use_tile(name, tile))
            events = stack.enter_context(_launch.record(DEVICE))
            if stride is None:
                kernels.conv2d_relu_pool(*inputs, padding)
            else:
                kernels.conv2d(*inputs, stride, padding, 1, groups, "relu")
        about = {"case": layer, "dtype": str(dtype)[6:], "tile": tile}
        launches = [event for event in events if isinstance(event, _launch.Launch)]
        rows += [about | compile_launch(launch) for launch in launches]
    return rows


def report_input_grad():
    """The tiles of conv2d's input gradient for TMA: each stride, through a ReLU and not.

    In the plain layer also in fp16, with filters that are packed, and with the sum split.
    """
    lesson = importlib.import_module("tilelab.kernels.conv2d_input_grad")
    set_precision("tf32")
    jobs = []
    for item, tiles in importlib.import_module("tilelab.kernels.conv2d_tma").FAST_TILES.items():
        dtype = torch.bfloat16 if item == 2 else torch.float32
        for tile in tiles if "tma" in DEVICE.kernels else []:
            small = tile["BLOCK_M"] * tile["BLOCK_N"] <= 128 * 128
            jobs += [(dtype, stride, False, False, tile) for stride in (1, 2)]
            if small or item == 2:  # or the box of x does not fit
                jobs += [(dtype, stride, True, False, tile) for stride in (1, 2)]
            if item == 2:
                jobs += [(torch.float16, 1, False, False, tile), (dtype, 1, False, True, tile)]
                jobs += [(dtype, 1, False, False, tile | dict(SPLIT_K=4))] if small else []
    rows = []
    for dtype, stride, relu, packed, tile in jobs:
        x, dy = (images(64, c, 28 // s, 28 // s, dtype=dtype) for c, s in [(128, 1), (256, stride)])
        weight = images(256, 128, 3, 3, dtype=dtype)
        weight = weight.contiguous() if packed else weight
        geometry = [stride, stride], [1, 1], [1, 1], 1
        name = "conv2d_input_grad_relu" if relu else "conv2d_input_grad"
        with _tiles.use_tile(name, tile), _launch.record(DEVICE) as events:
            if relu:
                lesson.conv2d_input_grad_relu(dy, weight, x, *geometry)
            else:
                lesson.conv2d_input_grad(dy, weight, list(x.shape), *geometry)
        case = f"stride {stride}" + " through a ReLU" * relu + ", packed" * packed
        about = {"case": case, "dtype": str(dtype)[6:], "tile": tile}
        launches = [event for event in events if isinstance(event, _launch.Launch)]
        rows += [about | compile_launch(launch) for launch in launches]
    return rows


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


def report_weight_grad():
    """FAST_TILES of the weight gradient: whole, with the sum in parts and with the bias gradient.

    In parts the result is float32, and needs more room. Few channels go through registers.
    """
    lesson = importlib.import_module("tilelab.kernels.conv2d_weight_grad")
    fast = importlib.import_module("tilelab.kernels.conv2d_weight_grad_tma")
    jobs = [(torch.float16, "3x3", fast.FAST_TILES[2][0], False)]
    deep = [tile for tile in fast.FAST_TILES[2] if tile["BLOCK_K"] == 64]
    for tile in fast.FAST_TILES[2] if DEVICE.capability == 90 else deep:  # the others are alike
        parts = tile | dict(SPLIT_K=4)
        jobs += [
            (torch.bfloat16, "3x3", tile, False),
            (torch.bfloat16, "3x3 at stride 2", parts, True),
            (torch.bfloat16, "stem", parts, False),
            (torch.bfloat16, "16 channels", tile, True),
        ]
        if tile["BLOCK_M"] == 64:
            jobs += [
                (torch.bfloat16, "1x1", parts, False),
                (torch.bfloat16, "stem of stride 1", parts, True),
            ]
        if tile["BLOCK_N"] == 256:  # pixels are columns
            jobs += [
                (torch.bfloat16, "64 channels", tile, False),
                (torch.bfloat16, "64 channels", parts, True),
                (torch.bfloat16, "64 channels, 128 filters", parts, True),
            ]
    rows = []
    for dtype, layer, tile, bias in jobs:
        x, weight, stride, padding = WEIGHT_LAYERS[layer]
        x, weight = images(*x, dtype=dtype), images(*weight, dtype=dtype)
        (N, _, H, W), (K, _, R, S) = x.shape, weight.shape
        P, Q = ((n + 2 * padding - taps) // stride + 1 for n, taps in ((H, R), (W, S)))
        fn = lesson.conv2d_weight_bias_grad if bias else lesson.conv2d_weight_grad
        geometry = [stride] * 2, [padding] * 2, [1, 1], 1
        with _tiles.use_tile("conv2d_weight_grad", tile), _launch.record(DEVICE) as events:
            fn(x, images(N, K, P, Q, dtype=dtype), weight, *geometry)
        about = {"case": layer, "dtype": str(dtype)[6:], "tile": tile}
        launches = [e for e in events if isinstance(e, _launch.Launch)]
        launches = [e for e in launches if e.kernel is fast.conv2d_weight_grad_tma_kernel]
        rows += [about | compile_launch(launch) for launch in launches]
    return rows


def modules():
    """Every module of kernels/ (the functions hide some: `kernels.matmul` is one)."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"tilelab.kernels.{name}") for name in names]


def missing(rows):
    """The kernels that no case has launched: anything `@triton.jit` that is named `*_kernel`."""
    defined = {
        name
        for module in modules()
        for name, x in vars(module).items()
        if isinstance(x, triton.JITFunction) and name.endswith("_kernel")
    }
    # Of what this target has.
    fast = {"matmul_tma_kernel", "matmul_reduce_kernel", "scaled_matmul_tma_kernel"}
    fast |= {"conv2d_tma_kernel", "conv2d_pack_kernel", "conv2d_pack_filter_kernel"}
    fast |= {"conv2d_input_grad_tma_kernel", "conv2d_unfold_kernel"}
    fast |= {"conv2d_weight_grad_tma_kernel"}
    lacking = set() if "tma" in DEVICE.kernels else fast
    return sorted(defined - lacking - {row["kernel"] for row in rows})


if __name__ == "__main__":
    aot.compile_for(sys.argv[1])
    DEVICE = aot.device(sys.argv[1])
    if "--matmul" in sys.argv:
        print(json.dumps({"launches": report_matmul()}, default=str))
    elif "--conv2d" in sys.argv:
        print(json.dumps({"launches": report_conv2d()}, default=str))
    elif "--input-grad" in sys.argv:
        print(json.dumps({"launches": report_input_grad()}, default=str))
    elif "--weight-grad" in sys.argv:
        print(json.dumps({"launches": report_weight_grad()}, default=str))
    elif "--tiles" in sys.argv:
        print(json.dumps({"launches": report_tiles()}, default=str))
    else:
        rows = report(BFLOAT16 + FLOAT32)
        print(json.dumps({"launches": rows, "missing": missing(rows)}, default=str))

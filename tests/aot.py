"""Compile every kernel for GPUs that are not here, and report what came of it as JSON.

    TRITON_INTERPRET=0 python -m tests.aot sm_90            each kernel at its default tiles
    TRITON_INTERPRET=0 python -m tests.aot sm_90 --tiles    every tile of every TILES list

test_compile.py runs this in processes of its own, because a process has to choose between compiler
and interpreter before it imports triton. Nobody lists the kernels' arguments here: each op is
called on empty CPU tensors while `launch` records what it was asked to launch instead of launching
it, and that is compiled. So what is compiled is what a GPU would be asked to run.

The report is a JSON object: "launches" (a list of what `compile_launch` returns) and "missing" (the
names of kernels that no case launches).
"""

import contextlib
import importlib
import json
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import _launch
from tests.inputs import gradients

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = (
    r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"  # in PTX, and in AMD's assembly
)
BFLOAT16 = [(torch.bfloat16, "ieee")]  # with the precision of float32 products
FLOAT32 = [(torch.float32, "ieee"), (torch.float32, "tf32")]
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def train(fn, *inputs, **options):
    """Call `fn` and its backward."""
    y = fn(*inputs, **options)
    gradients(lambda *xs: fn(*xs, **options), inputs, torch.empty_like(y))


def images(*shape, dtype):
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def step(optimizer, dtype, **options):
    p = torch.nn.Parameter(torch.empty(1000, dtype=dtype))
    p.grad = torch.empty_like(p)
    optimizer([p], **options).step()


# Calls that between them launch every kernel with every default tile: sizes that shrink none.
CASES = {
    "matmul": lambda dtype: train(
        kernels.matmul, *(torch.empty(s, dtype=dtype) for s in [(512, 1024), (1024, 256), 256])
    ),
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
    "conv2d_relu_pool": lambda dtype: train(
        kernels.conv2d_relu_pool,
        images(64, 128, 28, 28, dtype=dtype),
        images(128, 128, 3, 3, dtype=dtype),
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
}


def record(case, dtype):
    """The launches [(kernel, args, meta)] of one case, none of which take place."""
    launches = []

    def launch(kernel, grid, *args, **meta):
        if 0 not in grid:
            launches.append((kernel, args, meta))

    with contextlib.ExitStack() as stack:
        for owner, name, fake in [
            (_launch, "_nearest", lambda *_: None),  # the defaults, nothing tuned
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            *((module, "launch", launch) for module in modules()),
            *((module, "check_device", lambda *_: None) for module in modules()),
        ]:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, fake))
        CASES[case](dtype)
    return launches


def modules():
    """Every module of kernels/ (the functions hide some: `kernels.matmul` is one)."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"kernels.{name}") for name in names]


def specialize(kernel, args, meta):
    """(signature, constants, divisible, options), by the rules of `triton.jit` for a launch.

    An int that is 1 is a constant, and so is None. Pointers and ints that are multiples of 16 are
    known to be: `divisible` are their positions. Tensors are taken to be aligned, as torch's are.
    """
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in meta.items() if k in names}
    options = {k: v for k, v in meta.items() if k not in names}
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, divisible = {}, {}, []
    for i, name in enumerate(names):
        value = values[name] if name in values else kernel.params[i].default
        if isinstance(value, list):  # a table of addresses
            signature[name] = "*i64"
            divisible.append(i)
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            divisible.append(i)
        elif name in constexpr or value is None or (value == 1 and type(value) is int):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, bool):
            signature[name] = "u1"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(i)
    return signature, constants, divisible, options


def compile_launch(target, kernel, signature, constants, divisible, options):
    """Compile, and return what a test wants to know; {"error": ...} where it does not compile."""
    row = dict(kernel=kernel.__name__, constants=constants, options=options)
    row["types"] = [t for t in signature.values() if t.startswith("*")]
    known = [["tt.divisibility", 16]]
    pointer = known + [["tt.pointer_range", 32]] * (target.backend == "hip")  # below 2 GiB
    attrs = {
        (i,): pointer if signature[kernel.arg_names[i]][0] == "*" else known for i in divisible
    }
    try:
        source = ASTSource(kernel, signature, constants, attrs)
        compiled = triton.compile(source, target=target, options=options)
    except Exception as e:
        return row | {"error": f"{type(e).__name__}: {e}"[:2000]}
    assembly = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
    row["shared"] = compiled.metadata.shared
    row["tensor_cores"] = sorted(set(re.findall(TENSOR_CORES, assembly)))
    row["dots"] = compiled.asm["ttir"].count("tt.dot ")
    if target.backend == "hip":
        row["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        row["spills"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
    else:
        row["registers"], row["spills"] = usage(compiled.asm["cubin"])
    return row


def usage(cubin):
    """(registers, bytes of stack and local memory) of the only kernel in `cubin`."""
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def set_precision(precision):
    """Of float32 matmuls and convolutions: "ieee" or "tf32"."""
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def report(target, dtypes, cases=CASES, only=None, tile=None):
    """Compile what the cases launch (of the kernels of module `only`), once a dtype and tile."""
    rows, seen = [], set()
    for case in cases:
        for dtype, precision in dtypes:
            set_precision(precision)
            for kernel, args, meta in record(case, dtype):
                signature, constants, divisible, options = specialize(kernel, args, meta)
                key = (
                    kernel,
                    dtype,
                    *sorted((k, str(v)) for k, v in constants.items() if k.isupper()),
                )
                if key in seen or only not in (None, kernel.__module__):
                    continue
                seen.add(key)
                row = compile_launch(
                    TARGETS[target], kernel, signature, constants, divisible, options
                )
                rows.append({"case": case, "dtype": str(dtype)[6:], "tile": tile} | row)
    return rows


def report_tiles(target):
    """The same in bfloat16 for every tile of every TILES list, with all kernels of its file."""
    rows = []
    launched = {case: {k.__module__ for k, *_ in record(case, torch.bfloat16)} for case in CASES}
    for module in modules():
        if hasattr(module, "TILES") and hasattr(module, "choose_tile"):
            cases = [case for case in CASES if module.__name__ in launched[case]]
            for tile in module.TILES:

                def choose(op, dtype, default, tile=tile, **sizes):
                    return _launch.choose_tile(op, dtype, {dtype.itemsize: tile}, **sizes)

                with mock.patch.object(module, "choose_tile", choose):
                    rows += report(target, BFLOAT16, cases, module.__name__, tile)
    return rows


def missing(rows):
    """The kernels that no case has launched: anything `@triton.jit` that is named `*_kernel`."""
    defined = {
        name
        for module in modules()
        for name, x in vars(module).items()
        if isinstance(x, triton.JITFunction) and name.endswith("_kernel")
    }
    return sorted(defined - {row["kernel"] for row in rows})


if __name__ == "__main__":
    if "--tiles" in sys.argv:
        print(json.dumps({"launches": report_tiles(sys.argv[1])}, default=str))
    else:
        rows = report(sys.argv[1], BFLOAT16 + FLOAT32)
        print(json.dumps({"launches": rows, "missing": missing(rows)}, default=str))

"""Plant a fault in a kernel and see which test finds it: `make mutants`.

A suite is worth what it finds. Each of MUTANTS is one fault of a kind that kernels really have: a
mask that is missing, an offset in 32 bits, a part of a sum that is lost. The faults are planted one
at a time in a copy of the tree. The tests that should find a fault run there until one fails:

    python -m tests.tools.mutants                 all that have no result yet
    python -m tests.tools.mutants --again matmul  those whose name contains "matmul", once more
    python -m tests.tools.mutants --list          what has been found so far

Results are kept in a file, so a run that was ended goes on. The exit status is 1 if no test found a
mutant. It is also 1, with a message, if the text of a mutant is not in its file exactly once: the
kernel has changed, and the mutant must follow.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tilelab.perf.rows.results import write_whole

ROOT = pathlib.Path(__file__).parents[2]
COPIED = ["kernels", "nets", "perf", "tests", "tilelab", "pyproject.toml"]
SECONDS = 900  # that the tests of one mutant may take


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        file: of kernels/.
        text: what stands there, exactly once.
        replacement: the fault.
        tests: arguments for pytest, tried in this order until one run fails.
    """

    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


def contracts(operator: str, words: str = "") -> str:
    """The contract suite of the operators whose name has this word, or its tests with these."""
    return f"tests/kernels/test_contracts.py -k {operator}" + (f" and {words}" if words else "")


def own(name: str, words: str = "") -> str:
    """A test file of tests/kernels, or those of its tests that have these words."""
    return f"tests/kernels/test_{name}.py" + (f" -k {words}" if words else "")


MUTANTS = {
    # --- matmul
    "matmul: a load of A without its mask": Mutant(
        "matmul.py",
        "a = tl.load(a_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)",
        "a = tl.load(a_ptrs)",
        (contracts("matmul"), own("matmul")),
    ),
    "matmul: rows in 32 bits": Mutant(
        "matmul.py",
        "offs_m = pid_m.to(tl.int64) * BLOCK_M",
        "offs_m = pid_m * BLOCK_M",
        (contracts("matmul", "past"), contracts("matmul"), own("matmul")),
    ),
    "matmul: sums in float16": Mutant(
        "matmul.py",
        "        acc = tl.dot(a, b, acc, input_precision=PRECISION)\n        if SUMS:",
        "        acc = tl.dot(a, b, acc, input_precision=PRECISION).to(tl.float16).to(tl.float32)\n"
        "        if SUMS:",
        (contracts("matmul"), own("matmul")),
    ),
    "matmul: the last group of rows is as long as the others": Mutant(
        "matmul.py",
        "rows = tl.minimum(blocks_m - first_m, GROUP_M)",
        "rows = GROUP_M",
        (own("matmul", "grouping"), own("matmul")),
    ),
    "matmul: TMA where the rows of C are no multiple of 16 bytes": Mutant(
        "matmul_tma.py",
        "if not (M and N and K) or N * item % 16:",
        "if not (M and N and K):",
        (own("fast", "borders_of_matmul"), own("fast")),
    ),
    "matmul: TMA loses the last step of every part": Mutant(
        "matmul_tma.py",
        "range(part * steps, part * steps + steps)",
        "range(part * steps, part * steps + steps - 1)",
        (own("fast", "every_layer and matmul"), own("fast")),
    ),
    # --- bias_relu and sums of parts
    "bias_relu: every chunk of rows writes the first partial sum": Mutant(
        "bias_relu.py",
        "db_ptr + tl.program_id(0).to(tl.int64) * N + offs_n",
        "db_ptr + offs_n",
        (own("bias_relu", "chunks"), own("bias_relu")),
    ),
    "bias_relu: the gradient passes where y is 0": Mutant(
        "activation.py",
        "out = tl.where(z <= 0, 0.0, dy)",
        "out = tl.where(z < 0, 0.0, dy)",
        (own("bias_relu", "zero"), contracts("bias_relu")),
    ),
    "sum_partials: rows past the last part are added": Mutant(
        "_partial_sums.py",
        ")[:, None] & mask[None, :]",
        ")[:, None] | mask[None, :]",
        (own("launch", "sum_partials"),),
    ),
    "rows: dimensions are joined though only one tensor lies so": Mutant(
        "_rows.py",
        "if sizes and all(a == size * b",
        "if sizes and any(a == size * b",
        (contracts("softmax"), own("launch", "as_rows"), own("bias_relu")),
    ),
    # --- the convolution
    "conv2d: taps in rows of R instead of S": Mutant(
        "conv2d.py",
        "r, s = tap // S, tap % S",
        "r, s = tap // R, tap % R",
        (contracts("conv2d"), own("conv2d")),
    ),
    "conv2d: the right border is not padding": Mutant(
        "conv2d.py",
        "valid = (row >= 0) & (row < H) & (col >= 0) & (col < W)",
        "valid = (row >= 0) & (row < H) & (col >= 0)",
        (contracts("conv2d"), own("conv2d")),
    ),
    "conv2d: few channels in 32 bits": Mutant(
        "conv2d.py",
        "j = j0 + tl.arange(0, BLOCK_K).to(tl.int64)",
        "j = j0 + tl.arange(0, BLOCK_K)",
        (contracts("conv2d", "past"), contracts("conv2d"), own("conv2d")),
    ),
    "conv2d: far tensors in 32 bits": Mutant(
        "conv2d.py",
        "return max(far) < 2**30",
        "return max(far) < 2**40",
        (contracts("conv2d", "past"), contracts("conv2d"), own("conv2d")),
    ),
    "conv2d: a bias of any stride is read as contiguous": Mutant(
        "conv2d.py",
        "0 if bias is None else bias.stride(0), *y.stride(), R, S",
        "0 if bias is None else 1, *y.stride(), R, S",
        (contracts("conv2d", "layouts"), contracts("conv2d"), own("conv2d")),
    ),
    "conv2d: TF32 follows the switch of matmul": Mutant(
        "conv2d.py",
        "precision = dot_precision(x.dtype, torch.backends.cudnn.conv)",
        "precision = dot_precision(x.dtype, torch.backends.cuda.matmul)",
        (contracts("conv2d", "switch"), contracts("conv2d"), own("conv2d")),
    ),
    "depthwise: rows above the image are read": Mutant(
        "conv2d_depthwise.py",
        "row = (h + i * DIL_H).to(tl.uint32) < H",
        "row = (h + i * DIL_H) < H",
        (contracts("depthwise"), own("conv2d_depthwise")),
    ),
    "1x1: images that do not lie evenly are a matrix": Mutant(
        "_geometry.py",
        "elif s != expected:",
        "elif s < 0:",
        (own("fast", "borders_of_conv2d"), contracts("conv2d")),
    ),
    # --- its gradients
    "input gradient: the first tap of a class without the inverse": Mutant(
        "conv2d_input_grad.py",
        "r0 = class_h // GCD_H * INV_H % r_step",
        "r0 = class_h // GCD_H % r_step",
        (own("conv2d_grad", "stride_and_dilation"), own("conv2d_grad")),
    ),
    "input gradient: one row of dy too many": Mutant(
        "conv2d_input_grad.py",
        "inside = (p0 >= up) & (p0 < P + up)",
        "inside = (p0 >= up) & (p0 <= P + up)",
        (contracts("conv2d"), own("conv2d_grad")),
    ),
    "weight gradient: the last chunk of pixels is as long as the others": Mutant(
        "conv2d_weight_grad.py",
        "tl.minimum(N * tl.cast(P, tl.int64) * Q - first, ",
        "tl.maximum(0 * first, ",
        (own("conv2d_grad", "parts or split"), own("conv2d_grad")),
    ),
    "weight gradient: the bias gradient of every group is that of the first": Mutant(
        "conv2d_weight_grad.py",
        "db_ptr + part * filters + group * K + offs_m",
        "db_ptr + part * filters + offs_m",
        (own("conv2d_grad", "atomics"), contracts("conv2d"), own("conv2d_grad")),
    ),
    "weight gradient: atomics by default": Mutant(
        "conv2d_weight_grad.py",
        'options.pop("ATOMIC", False)',
        'options.pop("ATOMIC", True)',
        (own("conv2d_grad", "atomics"), contracts("conv2d"), own("conv2d_grad")),
    ),
    # --- the kernels for TMA
    "conv2d TMA: an odd padding at stride 2 begins at a group's first column": Mutant(
        "conv2d_tma.py",
        "FIRST_W: tl.constexpr = LEFT * STRIDE_W - PAD_W",
        "FIRST_W: tl.constexpr = 0",
        (
            own("fast", "every_layer and conv2d"),
            own("fast"),
        ),
    ),
    "conv2d TMA: the last step of the sum is lost": Mutant(
        "conv2d_tma.py",
        "range(first, tl.minimum(first + part_steps, steps))",
        "range(first, tl.minimum(first + part_steps, steps - 1))",
        (
            own("fast", "every_layer and conv2d"),
            own("fast"),
        ),
    ),
    "conv2d TMA: chosen where x is not aligned": Mutant(
        "conv2d_tma.py",
        "if plan is None or (plan.fold is None and x.data_ptr() % 16):",
        "if plan is None:",
        (own("fast", "borders_of_conv2d"), own("fast")),
    ),
    "pool: of equal values the last wins": Mutant(
        "conv2d_tma.py",
        "(acc2 > best) | (acc2 != acc2)",
        "(acc2 >= best) | (acc2 != acc2)",
        (own("conv2d_relu_pool", "first_of"), contracts("relu_pool"), own("conv2d_relu_pool")),
    ),
    "input gradient TMA: a part begins at the first tap of its row": Mutant(
        "conv2d_input_grad_tma.py",
        "tap_s = first // blocks_k % tl.maximum(taps_s, 1)",
        "tap_s = 0",
        (
            own("fast", "input_grad and (every_layer or parts)"),
            own("fast"),
        ),
    ),
    "input gradient TMA: a tile reaches into the next pixel's channels": Mutant(
        "conv2d_input_grad_tma.py",
        "c = tl.minimum(c, C - BLOCK_N)",
        "c = c + 0",
        (
            own("fast", "input_grad and (every_layer or parts)"),
            own("fast"),
        ),
    ),
    "weight gradient TMA: the steps that divide nothing are lost": Mutant(
        "conv2d_weight_grad_tma.py",
        "each * (part + 1) + tl.minimum(more, part + 1)",
        "each * (part + 1) + tl.minimum(more, part)",
        (
            own("fast", "weight_grad and (every_layer or nan)"),
            own("fast"),
        ),
    ),
    "weight gradient TMA: a window too many at the upper border": Mutant(
        "conv2d_weight_grad_tma.py",
        "tl.minimum(tl.cdiv(tl.maximum(-first, 0), STRIDE), windows)",
        "tl.minimum(tl.maximum(-first, 0) // STRIDE, windows)",
        (
            own("fast", "weight_grad and (every_layer or nan)"),
            own("fast"),
        ),
    ),
    "weight gradient TMA: the bias gradient of one part alone": Mutant(
        "conv2d_weight_grad_tma.py",
        "tl.store(db_ptr + part * K + offs_k",
        "tl.store(db_ptr + offs_k",
        (
            own("fast", "weight_grad and (every_layer or nan)"),
            own("fast"),
        ),
    ),
    # --- the fused block, pooling, im2col
    "relu_pool: a window of 0 passes a gradient": Mutant(
        "conv2d_relu_pool.py",
        "place = tl.where(best <= 0, 4, place)",
        "place = tl.where(best < 0, 4, place)",
        (own("conv2d_relu_pool", "first_of"), contracts("relu_pool"), own("conv2d_relu_pool")),
    ),
    "relu_pool: weights below the filter are read": Mutant(
        "conv2d_relu_pool_grad.py",
        "((u > 0) & (u <= R))[None, :] & mask",
        "(u > 0)[None, :] & mask",
        (contracts("relu_pool"), own("conv2d_relu_pool")),
    ),
    "relu_pool: the bias gradient sums dead windows too": Mutant(
        "conv2d_relu_pool_grad.py",
        "live += tl.where(place < 4, dy.to(tl.float32), 0.0)",
        "live += dy.to(tl.float32)",
        (own("conv2d_relu_pool", "first_of"), contracts("relu_pool"), own("conv2d_relu_pool")),
    ),
    "max_pool2d: a NaN does not win": Mutant(
        "pool.py",
        "better = (x > best) | (x != x)",
        "better = x > best",
        (own("pool"),),
    ),
    "max_pool2d: pixels in 32 bits": Mutant(
        "pool.py",
        "offs = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw",
        "offs = h * stride_xh + w * stride_xw",
        (contracts("max_pool2d", "past"), contracts("max_pool2d"), own("pool")),
    ),
    "col2im: windows between two strides are summed": Mutant(
        "im2col.py",
        "copied = (up >= 0) & (up % STRIDE_H == 0) & (p < P)",
        "copied = (up >= 0) & (p < P)",
        (contracts("col2im"), own("im2col")),
    ),
    # --- softmax and cross_entropy
    "softmax: what is masked counts as 0": Mutant(
        "softmax.py",
        "e = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2_E)",
        "x = tl.where(mask, x, 0.0)\n    e = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2_E)",
        (contracts("softmax"), own("softmax")),
    ),
    "softmax: an online maximum begins at -inf": Mutant(
        "softmax.py",
        "LOWEST = tl.constexpr(torch.finfo(torch.float32).min)",
        'LOWEST = tl.constexpr(float("-inf"))',
        (own("softmax", "special"), own("softmax")),
    ),
    "cross_entropy: smoothing is spread over the block": Mutant(
        "cross_entropy.py",
        "rest = g * (smoothing / N) if SMOOTH",
        "rest = g * (smoothing / BLOCK_N) if SMOOTH",
        (own("cross_entropy", "options"), contracts("cross_entropy"), own("cross_entropy")),
    ),
    "cross_entropy: what comes down to an ignored row is read": Mutant(
        "cross_entropy.py",
        "g = tl.load(g_ptrs, mask=live, other=0.0)",
        "g = tl.load(g_ptrs, mask=mask_m, other=0.0)",
        (own("cross_entropy", "ignored"), own("cross_entropy")),
    ),
    "cross_entropy: the mean counts ignored rows": Mutant(
        "cross_entropy.py",
        "weight = weight / (target != ignore_index).sum()",
        "weight = weight / target.numel()",
        (own("cross_entropy", "mean_counts"), contracts("cross_entropy"), own("cross_entropy")),
    ),
    # --- the rest
    "scaled_matmul: the scales of a row are strided like a column's": Mutant(
        "scaled_matmul.py",
        "scale_b.stride(-1) if scale_b.dim() else 0",
        "scale_b.stride(0) if scale_b.dim() else 0",
        (own("scaled_matmul", "matrices"), contracts("scaled_matmul"), own("scaled_matmul")),
    ),
    "SGD: maximize takes the weight decay along": Mutant(
        "optim.py",
        "g = sign * g.to(tl.float32) + weight_decay * p",
        "g = sign * (g.to(tl.float32) + weight_decay * p)",
        (own("optim"),),
    ),
    "AdamW: the first program counts the step and does not wait for the others": Mutant(
        "optim.py",
        "if tl.atomic_add(ticket_ptr + parameter, 1) == tl.load(plan_ptr + 3) - 1:",
        "if tl.atomic_add(ticket_ptr + parameter, 1) == 0:",
        (own("optim", "counted"), own("optim")),
    ),
    "AdamW: 1 - beta2 in float32": Mutant(
        "optim.py",
        "v = beta2 * v + rest2 * g * g",
        "v = beta2 * v + (tl.full((1,), 1.0, tl.float32) - beta2) * g * g",
        (own("optim", "beta2"), own("optim")),
    ),
    "a stack of layers: a bias gradient is the next layer's": Mutant(
        "conv2d_stack.py",
        "dy, dbias = dx, before",
        "dy, dbias = dx, dbias",
        (contracts("stack"), own("conv2d_stack")),
    ),
}


def plant(tree: pathlib.Path, mutant: Mutant) -> None:
    """Put the fault into the tree."""
    path = tree / "kernels" / mutant.file
    text = path.read_text()
    if text.count(mutant.text) != 1:
        sys.exit(f"{mutant.file} must have this once, and has it {text.count(mutant.text)} times:\n"
                 f"{mutant.text}")  # fmt: skip
    path.write_text(text.replace(mutant.text, mutant.replacement))


def run(tree: pathlib.Path, python: str, mutant: Mutant) -> dict:
    """Who has caught the mutant that is in the tree, and after how many seconds."""
    started = time.time()
    variables = os.environ | {
        "TRITON_INTERPRET": "1", "CI": "1", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    caught = None
    for args in mutant.tests:
        files, _, words = args.partition(" -k ")
        command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   "-m", "not gpu and not slow", *files.split()]  # fmt: skip
        try:
            done = subprocess.run(
                command + (["-k", words] if words else []), cwd=tree, env=variables, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            caught = f"{args}: it never ended"
            break
        if done.returncode < 0:  # a read far out of bounds ends Python itself
            caught = f"{args}: ended by signal {-done.returncode}"
            break
        if done.returncode not in (0, 1):  # no tests, or they could not even be collected
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        if done.returncode:
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
            caught = failed[1] if failed else args
            break
    return dict(caught=caught, seconds=round(time.time() - started, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="the tree to copy")
    parser.add_argument("--python", default=sys.executable, help="which has torch and pytest")
    parser.add_argument("--results", type=pathlib.Path, help="default: build/mutants.json")
    parser.add_argument("--again", metavar="WORDS", help="run those of this name once more")
    parser.add_argument("--list", action="store_true", help="show the results, run nothing")
    parser.add_argument(
        "--other", type=pathlib.Path,
        help="a JSON file {name: {file, text, replacement, tests}}, where another tree differs",
    )  # fmt: skip
    args = parser.parse_args()

    mutants = dict(MUTANTS)
    for name, changes in (json.loads(args.other.read_text()) if args.other else {}).items():
        mutants[name] = mutants[name]._replace(**changes)
    path = args.results or ROOT / "build" / "mutants.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, mutant in mutants.items():
        if args.list or (name in results and not (args.again and args.again in name)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            tree = pathlib.Path(folder)
            for part in COPIED:
                source = args.tree / part
                if source.is_dir():
                    skipped = shutil.ignore_patterns("__pycache__", "results")
                    shutil.copytree(source, tree / part, ignore=skipped)
                elif source.exists():
                    shutil.copy(source, tree / part)
            plant(tree, mutant)
            results[name] = run(tree, args.python, mutant)
        write_whole(path, json.dumps(results, indent=1).encode())
        print(name, results[name], flush=True)

    for name in mutants:
        found = results.get(name)
        state = "not run" if found is None else "caught" if found["caught"] else "MISSED"
        by = "" if not found else f"{found['seconds']:6.1f} s  {found['caught'] or ''}"
        print(f"{state:8} {name:75} {by}")
    missed = [name for name in mutants if name in results and not results[name]["caught"]]
    run_so_far = sum(name in results for name in mutants)
    print(f"{run_so_far} of {len(mutants)} run, {len(missed)} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

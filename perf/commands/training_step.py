"""`tilelab step`: what a training step of the demo CNN launches, moves and keeps.

A step of a small network is many short launches. So launches count first, then the bytes that go
through memory, then what is kept from the forward pass for the backward. All three are known
without a GPU. `kernels._launch.record` lists our launches, as they would be on a GPU of the target;
torch's own operators are watched while they run on the CPU. Each number stands beside the least
that is possible, one launch for each layer each way (perf/work/cost.py), and beside PyTorch's
number for the same network.

    launches    ours are recorded. An operator of torch's counts as one, a convolution's backward
                as one for each gradient: it may be more. Views and allocations launch nothing.
    bytes       each tensor that a launch is given counts once; what an optimizer updates, twice
    kept        tensors that autograd keeps, without the parameters

Ours is the whole step of nets/step.py, which also gathers its images and records its loss. The step
of torch begins with images in its dtype and ends with the optimizer, AdamW in its fused form.

With a GPU the same steps are timed there, ours and every peer's (perf/work/peers.py). The most
memory that a step takes is read from torch's allocator.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilelab import kernels
from tilelab.kernels import _launch
from tilelab.perf.clock import devices, timing
from tilelab.perf.compiler import aot
from tilelab.perf.errors import PerfError
from tilelab.perf.rows import results
from tilelab.perf.work import cost, workloads
from tilelab.perf.work.peers import forget_compiled

BATCHES = (256, 1024, 4096)
PEERS = ("tilelab", "torch", "graph", "compile")
NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "_record_function")
UPDATED = (0, 3, 4)  # of the six addresses that AdamW's kernel has for a tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)), metavar="N,...")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument("--target", default="sm_90", help="of the launches (default: sm_90)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")


def run(args: argparse.Namespace) -> int:
    """Count, and with a GPU measure; print a table for each batch."""
    try:
        batches = [int(text) for text in args.batch.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise PerfError(f"--batch takes numbers of images, not {args.batch!r}")
    if args.dtype not in ("bf16", "fp16", "fp32"):
        raise PerfError(f"--dtype is bf16, fp16 or fp32, not {args.dtype!r}")
    dtype = workloads.DTYPES[args.dtype][0]
    steps = counted(batches, dtype, args.target)
    device = devices.current_device()
    for step in steps:
        if device.torch_device != "cpu":
            step["measured"] = measured(device, step["batch"], dtype)
        print(text(step))
    if args.json:
        results.write_whole(args.json, (json.dumps({"steps": steps}, indent=1) + "\n").encode())
        print(f"written to {args.json}")
    return 0


def counted(batches: list[int], dtype: str, target: str) -> list[dict[str, Any]]:
    """Count steps in a process of its own, which has no GPU and would compile for the target."""
    command = [sys.executable, "-m", "tilelab.perf.commands.training_step", dtype, target]
    result = subprocess.run(
        [*command, *map(str, batches)], env=os.environ | aot.ENVIRONMENT, capture_output=True,
        text=True,
    )  # fmt: skip
    if result.returncode:
        raise PerfError(f"counting failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def count(batch: int, dtype: str, target: str) -> dict[str, Any]:
    """Count a step of ours and one of torch's, on tensors of the CPU."""
    from tilelab.nets import models, step

    compute = getattr(torch, dtype)
    labels = torch.zeros(batch, dtype=torch.int64)
    with _launch.record(aot.device(target)) as events:  # before: what is made once
        model = models.build("cnn", (1, 28, 28), 10)
        optimizer = kernels.AdamW(model.parameters(), capturable=True)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
        images = torch.zeros(batch, 28, 28, dtype=torch.uint8)
        data = images, labels, 0.0, 1.0
        ours = step.TrainStep(model, optimizer, *data, batch, compute, scaler=scaler)
        for _ in range(2):  # the first one makes the optimizer's state
            ours.begin(torch.arange(batch), torch.zeros(batch, 2), torch.zeros(1))
            events.clear()
            with Ledger(events), listing_kept() as kept, aot.unchecked():
                ours.step()
    own = {"launches": [entry(e) for e in events if not isinstance(e, _launch.Choice)]}
    own["kept"] = kept_bytes(kept, [*model.parameters(), *ours.copies.values()])

    twin = models.build("cnn-torch", (1, 28, 28), 10).to(memory_format=torch.channels_last)
    adamw = torch.optim.AdamW(twin.parameters(), fused=True)
    x = torch.zeros(batch, 1, 28, 28, dtype=compute).to(memory_format=torch.channels_last)
    for _ in range(2):
        seen: list = []
        with Ledger(seen), listing_kept() as kept:
            with torch.autocast("cpu", compute, enabled=dtype != "float32"):
                logits = twin(x)
            loss = F.cross_entropy(logits.float(), labels)
            adamw.zero_grad()
            loss.backward()
            adamw.step()
    return {
        "batch": batch,
        "dtype": dtype,
        "target": target,
        "minimum": {
            "launches": cost.train_step_launches(),
            "bytes": cost.train_step_bytes({"N": batch}, compute.itemsize),
        },
        "tilelab": own,
        "torch": {"launches": seen, "kept": kept_bytes(kept, twin.parameters())},
    }


class Ledger(TorchDispatchMode):
    """Lists torch's operators that launch something, as (name, bytes), among our launches.

    It keeps no tensors of theirs: autograd would copy a gradient that somebody else holds.
    """

    def __init__(self, events: list) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator, and list it."""
        if func.namespace == "tilelab":  # ours: its Python, so that what is in it is seen
            with self:
                result = _maybe_get_opdef(func)._init_fn(*args, **(kwargs or {}))
            self.events[:] = map(entry, self.events)
            return result
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not _is_view(func) and not name.startswith(NO_LAUNCH):
            masks = args[-1] if name == "convolution_backward" else [True]
            leaves = tree_leaves((args, kwargs or {}, result))
            moved = sum(_size(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.events += [(name, moved // sum(masks))] * sum(masks)
        return result


@contextlib.contextmanager
def listing_kept() -> Iterator[list[torch.Tensor]]:
    """Within this context what autograd keeps for the backward is listed."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        yield kept


def kept_bytes(kept: list[torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of all that was kept, each storage once, but not of these parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = [x.untyped_storage() for x in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for at, size in sizes.items() if at not in known)


def entry(event: Any) -> tuple[str, int]:
    """The name of a launch, and the bytes that it reads and writes."""
    if not isinstance(event, _launch.Launch):
        return event
    tensors = {t.data_ptr(): t for t in _launch.tensors_of(event.args)}
    moved = sum(map(_size, tensors.values()))
    name = event.kernel.__name__
    if name == "adamw_kernel":  # in place: read and written
        rows = next(arg for arg in event.args if isinstance(arg, list))
        moved += sum(_size(t) for place in UPDATED for t in rows[place::6])
    return name, moved


def _size(x: torch.Tensor) -> int:
    """Bytes of memory that a tensor covers."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    """Whether all that an operator returns is memory that it was given, and did not write."""
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def measured(device: devices.CudaDevice, batch: int, dtype: str) -> dict[str, Any]:
    """Seconds of a step, and the most memory that it takes, for ours and each peer.

    The memory is that of the first steps of a second network, where nothing is compiled any more
    and no algorithm tried out: what that takes for a moment, no step does.
    """
    w = workloads.Workload("train_step", "step", dtype, "ieee", {"N": batch}, "")
    found = {}
    workloads.set_precision(w.precision)
    for impl in PEERS:
        forget_compiled()
        with device.stream(), workloads.cudnn_benchmark(True):
            runner = device.prepare([workloads.prepare(w, impl, device.torch_device, 0)])
            timing.warm(device, runner)
            seconds = sorted(runner.sample() for _ in range(50))[25]
            runner.close()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call = workloads.prepare(w, impl, device.torch_device, 0)
            for _ in range(2):  # the first one makes the optimizer's state
                call()
            device.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            del call
        found[impl] = {"seconds": seconds, "peak": peak}
    return found


def text(step: dict[str, Any]) -> str:
    """A step in lines: every launch of ours, and the totals."""
    lines = [f"{step['batch']} images, {step['dtype']}, {step['target']}"]
    width = max(len(name) for name, _ in step["tilelab"]["launches"])
    lines += [f"  {name:{width}}  {moved:>13,}" for name, moved in step["tilelab"]["launches"]]
    lines.append(f"  {'':{width}}  launches          bytes   kept (bytes)")
    for name in ("minimum", "tilelab", "torch"):
        launches, moved, kept = totals(step, name)
        shown = f"{kept:>14,}" if kept is not None else ""
        lines.append(f"  {name:{width}}  {launches:>8}  {moved:>13,} {shown}".rstrip())
    for name, row in step.get("measured", {}).items():
        lines.append(f"  {name:{width}}  {row['seconds'] * 1e6:.1f} us, peak {row['peak']:,} bytes")
    return "\n".join(lines)


def totals(step: dict[str, Any], name: str) -> tuple[int, int, int | None]:
    """Launches, bytes, and bytes kept of "minimum", "tilelab" or "torch"."""
    part = step[name]
    if name == "minimum":
        return part["launches"], part["bytes"], None
    return len(part["launches"]), sum(moved for _, moved in part["launches"]), part["kept"]


if __name__ == "__main__":
    of_dtype, for_target, *sizes = sys.argv[1:]
    print(json.dumps([count(int(size), of_dtype, for_target) for size in sizes]))

"""What the kernels' host code costs a call: the checks of its arguments and the tile look-up."""

import functools
from typing import Any
from unittest import mock

import torch

from tilelab.kernels import _launch, _tiles
from tilelab.perf.clock.host_overhead import (
    TARGET,
    least_microseconds,
    small_workloads,
    without_gpu,
)
from tilelab.perf.compiler import aot

TUNED = 200  # shapes in the tuned table that a tile is looked up in


def check_costs(rounds: int, *ops: str) -> dict[str, float]:
    """µs of all that a forward call does besides torch's dispatch and its op, by operator.

    That is the checks of the arguments, and the look-up of the tile among `TUNED` shapes: what the
    kernels' own host code decides. The op itself is replaced by its result.
    """
    work = [w for w in small_workloads(*ops) if w.mode == "fwd"]
    custom_op, results = torch.library.CustomOpDef, {}
    real = custom_op.__call__

    def remembered(op: Any, *args: Any) -> Any:
        results[op] = real(op, *args)
        return results[op]

    with without_gpu() as make_call:
        checks = {w.op: make_call(w) for w in work}
        with mock.patch.object(custom_op, "__call__", remembered):
            for call in checks.values():
                call()
        with mock.patch.object(custom_op, "__call__", lambda op, *_: results[op]):
            costs = least_microseconds(checks, rounds)
    tables, look_ups = {}, {}
    for w in work:
        op, dtype, sizes, tile, kernels, *_ = aot.trace(w, None, TARGET).choice
        tables[op, w.dtype] = [
            dict(sizes={k: 2 ** ((i + 5 * j) % 15) + i for j, k in enumerate(sizes)}, tile=tile)
            for i in range(TUNED)
        ]
        x, default = torch.empty(0, dtype=dtype), {dtype.itemsize: tile}
        look_ups[w.op] = functools.partial(_tiles.choose_tile, op, x, default, kernels, **sizes)
    with (
        mock.patch.object(_launch, "_name", lambda index: "a GPU"),
        mock.patch.object(_tiles, "_tuned", lambda gpu: tables),
    ):
        for op, cost in least_microseconds(look_ups, rounds).items():
            costs[op] += cost
    return costs

"""Plant a fault in the PTX of a kernel and see that the machine notices: `make ptx-faults`.

perf/machine executes PTX and says what is wrong with it. It is worth what it finds. Here each kind
of kernel (ptx_fault_cases.py) gets each kind of fault (ptx_fault_kinds.py), one at a time:

    python -m tests.tools.ptx_faults                 those kernels that have no result yet
    python -m tests.tools.ptx_faults --again TMA     those whose name contains "TMA", once more
    python -m tests.tools.ptx_faults --list          what has been found so far

A fault is *seen* if the machine stops at it, reports something, or computes other bits than without
it: in lockstep, or with everything asynchronous as late as it may, or in a random order. Some
changes are no fault in the problem at hand: a guard that is true for everybody, two barriers with
nothing between them. For each of these a reason is looked for that a run can check
(ptx_fault_reasons.py, ptx_fault_orders.py, ptx_fault_intervals.py, ptx_fault_meetings.py).

If a fault is neither seen nor explained, the tool ends with status 1: the machine has a gap, or a
reason is missing. So it does if a barrier, fence, wait or commit is said to be missing where plain
lists of accesses find it needless: that is a false alarm.

Of kinds with many alike, such as an address in each of 64 loads, EACH are taken, evenly spread.
Results are kept in tests/ptx_faults.json, so a run that was ended goes on.
"""

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.tools import ptx_fault_intervals as intervals
from tests.tools import ptx_fault_meetings as meetings
from tests.tools import ptx_fault_orders as orders
from tests.tools import ptx_fault_reasons as reasons
from tests.tools.ptx_fault_cases import CASES, Launch, launches
from tests.tools.ptx_fault_kinds import Fault, faults
from tilelab.perf.compiler import aot
from tilelab.perf.machine import core
from tilelab.perf.machine.errors import MachineFault, UnknownInstruction
from tilelab.perf.machine.ptx import Instruction
from tilelab.perf.machine.units import Unit
from tilelab.perf.rows.results import write_whole

RESULTS = pathlib.Path(__file__).parents[1] / "ptx_faults.json"
ORDERS = (("lockstep", 0), ("late", 0), ("random", 1))
EACH = 6  # faults of a kernel that differ only in where they are
MANY = (
    "global address", "shared address", "guard removed", "zero fill removed", "TMA coordinate",
    "transposition", "descriptor: start", "descriptor: swizzle", "descriptor: leading offset",
    "descriptor: stride offset", "comparison off by one",
)  # fmt: skip
REASONS: tuple[Callable[[Launch, Fault, np.ndarray], str], ...] = (
    reasons.nobody_comes, reasons.guard_is_true, reasons.whole_copies, reasons.stored_already,
    reasons.same_pieces, reasons.same_bytes_loaded, reasons.never_used, reasons.stores_nothing_used,
    reasons.no_byte_copied, reasons.same_outcome, reasons.any_outcome, reasons.any_lane,
    reasons.any_value,
    orders.same_boxes, intervals.never_touched_again,
    meetings.only_they_meet, meetings.never_asked, meetings.known_already,
    meetings.enough_registers,
    orders.lands_elsewhere, intervals.nothing_to_order, intervals.nothing_passes,
)  # fmt: skip
ORDER_REASONS = REASONS[-3:]  # these are held against what the machine says, both ways


class Seen(Exception):
    """What the machine reported."""


class Impatient(core.Core):
    """A Core that stops at the first finding, and after `limit` blocks: a kernel that hangs."""

    limit, steps = 0, 0

    def report(
        self, kind: str, inst: Instruction, message: str, other: Instruction | None = None
    ) -> None:
        raise Seen(kind)

    def _step(self, unit: Unit) -> None:
        self.steps += 1
        if self.limit and self.steps > self.limit:
            raise Seen("no end")
        super()._step(unit)


class Right(NamedTuple):
    """How the untouched launch goes.

    Attributes:
        bytes: of global memory afterwards, the same in every order.
        steps: blocks that were executed, by order.
    """

    bytes: np.ndarray
    steps: dict[tuple[str, int], int]


def untouched(launch: Launch) -> Right:
    """Run it in every order.

    Raises:
        Seen: something was reported, so nothing can be learned from faults.
    """
    machines = {o: launch.core(Impatient, schedule=o[0], seed=o[1]).run() for o in ORDERS}
    results = [machine.global_.bytes for machine in machines.values()]
    if any((x != results[0]).any() for x in results):
        raise Seen(f"{launch.program.name}: another result in another order")
    return Right(results[0], {o: machine.steps for o, machine in machines.items()})


def notice(launch: Launch, fault: Fault, right: Right) -> tuple[str, str]:
    """How the fault is seen, and in which order; "" if not at all."""
    with_fault = reasons.planted(launch, fault)
    for order in ORDERS:
        how = _outcome(with_fault, order, right)
        if how:
            return how, order[0]
    return "", ""


def _outcome(launch: Launch, order: tuple[str, int], right: Right) -> str:
    try:
        machine = launch.core(Impatient, schedule=order[0], seed=order[1])
        machine.limit = 10 * right.steps[order] + 1000
        machine.run()
    except Seen as seen:
        return str(seen)
    except MachineFault as fault:
        return "deadlock" if "deadlock" in str(fault) else "fault"
    except UnknownInstruction:
        return "refused"
    return "wrong result" if (machine.global_.bytes != right.bytes).any() else ""


def chosen(all_of_them: list[Fault]) -> list[Fault]:
    """The faults that are planted: of MANY, EACH."""
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in all_of_them:
        by_kind[fault.kind].append(fault)
    kept = set()
    for kind, group in by_kind.items():
        count = min(len(group), EACH if kind in MANY else len(group))
        kept |= {id(group[i * len(group) // count]) for i in range(count)}
    return [fault for fault in all_of_them if id(fault) in kept]


def examine(launch: Launch, each: Callable[[list[Fault]], list[Fault]] = chosen) -> dict[str, Any]:
    """Plant the faults of a launch.

    Returns:
        By kind: how many there are, how many were planted, how they were seen, in which orders, and
        the reasons of those that were not. `unexplained` lists what is left; `disputed` what was
        seen though a list of accesses says that it changes nothing.
    """
    right = untouched(launch)
    existing = faults(launch.program, launch.maps)
    gc.collect()
    gc.freeze()  # what is here stays; a Core is full of cycles, and large
    kinds: dict[str, dict[str, Any]] = {}
    for fault in existing:
        entry = kinds.setdefault(
            fault.kind,
            dict(exist=0, planted=0, seen=Counter(), orders=Counter(), redundant=Counter()),
        )
        entry["exist"] += 1
    unexplained, disputed = [], []
    for fault in each(existing):
        entry = kinds[fault.kind]
        entry["planted"] += 1
        how, order = notice(launch, fault, right)
        if how:
            entry["seen"][how] += 1
            entry["orders"][order] += 1
            if any(explained(reason, launch, fault, right) for reason in ORDER_REASONS):
                disputed.append(_words(launch, fault))
        elif reason := why(launch, fault, right):
            entry["redundant"][re.sub(r"PTX line [\d and]+\d", "PTX line", reason)] += 1
        else:
            unexplained.append(_words(launch, fault))
        gc.collect()
    return dict(kinds=kinds, unexplained=unexplained, disputed=disputed)


def _words(launch: Launch, fault: Fault) -> str:
    at = "a tensor map" if fault.maps else reasons.changed(launch, fault).text
    return f"{fault.kind}: {fault.words}, at {at}"


def why(launch: Launch, fault: Fault, right: Right) -> str:
    """The first reason that holds for a fault that was not seen, or ""."""
    texts = (explained(reason, launch, fault, right) for reason in REASONS)
    return next((text for text in texts if text), "")


def explained(reason: Callable, launch: Launch, fault: Fault, right: Right) -> str:
    """What one reason says; a run that ends in a fault is none."""
    try:
        return reason(launch, fault, right.bytes)
    except (MachineFault, UnknownInstruction):
        return ""


def named() -> Iterator[tuple[str, str]]:
    """Cases and their kernels."""
    for name, case in CASES.items():
        for kernel in case.kernels:
            yield name, kernel


def _work(name: str) -> list[tuple[str, dict[str, Any]]]:
    """All of one case; in a process of its own."""
    found = []
    for launch in launches(CASES[name]):
        started = time.process_time()
        result = examine(launch)
        result["seconds"] = round(time.process_time() - started)
        found.append((f"{name}: {launch.program.name}", result))
    return found


# --- the table ------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """Kinds of faults: how many were planted, seen and redundant, with the reasons."""
    sums: dict[str, dict[str, Any]] = {}
    for result in results.values():
        for kind, entry in result["kinds"].items():
            total = sums.setdefault(
                kind, dict(exist=0, planted=0, seen=Counter(), redundant=Counter())
            )
            total["exist"] += entry["exist"]
            total["planted"] += entry["planted"]
            total["seen"].update(entry["seen"])
            total["redundant"].update(entry["redundant"])
    left = sum(len(result["unexplained"]) for result in results.values())
    disputed = sum(len(result["disputed"]) for result in results.values())
    lines = [f"{'exist':>6} {'planted':>7} {'seen':>6} {'redundant':>9}  kind of fault"]
    planted = seen = redundant = 0
    for kind, total in sorted(sums.items()):
        by_seen, by_reason = total["seen"].total(), total["redundant"].total()
        planted, seen, redundant = planted + total["planted"], seen + by_seen, redundant + by_reason
        lines.append(f"{total['exist']:6} {total['planted']:7} {by_seen:6} {by_reason:9}  {kind}")
        lines += [f"{'':34}{n:4} {reason}" for reason, n in total["redundant"].most_common()]
    lines.append(
        f"{len(results)} kernels: {planted} faults planted, {seen} seen, {redundant} redundant for "
        f"a reason that was checked, {left} neither, {disputed} disputed"
    )
    for name, result in results.items():
        lines += [f"  {name}: {text}" for text in result["unexplained"]]
        lines += [f"  {name}: seen, but needless: {text}" for text in result["disputed"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    parser.add_argument("--again", metavar="WORDS", help="the cases of this name once more")
    parser.add_argument("--list", action="store_true", help="show the results, plant nothing")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    done = {name.partition(": ")[0] for name in results.get("kernels", {})}
    todo = [n for n in CASES if n not in done or (args.again and args.again in n)]
    todo.sort(key=lambda name: CASES[name].target != "sm_90")  # the longest first
    if not args.list and todo:
        os.environ |= aot.ENVIRONMENT  # of the processes that compile: this one may interpret
        results = dict(
            triton=importlib.metadata.version("triton"), kernels=results.get("kernels", {})
        )
        with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
            for found in pool.imap_unordered(_work, todo):
                for name, result in found:
                    results["kernels"][name] = result
                    left = result["unexplained"] + result["disputed"]
                    print(name, f"{result['seconds']} s", *left, sep="\n  ", flush=True)
                ordered = [f"{name}: {kernel}" for name, kernel in named()]
                results["kernels"] = {
                    n: results["kernels"][n] for n in ordered if n in results["kernels"]
                }
                write_whole(args.results, (json.dumps(results, indent=1) + "\n").encode())
    found = results.get("kernels", {})
    print(table(found))
    return 1 if any(r["unexplained"] or r["disputed"] for r in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

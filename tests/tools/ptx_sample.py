"""Chooses which tests `make test` executes as PTX: those that reach the most in little time.

    pytest --on sm_80 --record runs/ptx.jsonl tests/kernels       what each test took and reached
    pytest --on sm_90 --record runs/ptx.jsonl tests/kernels
    python -m tests.tools.ptx_sample runs/ptx.jsonl               writes tests/ptx_sample/sm_80.txt
                                                                  and sm_90.txt

The first test of a list is the one that reaches the most in each second of it, the next one that
which adds the most to it, and so on: what comes first is worth the most. A test reaches *kinds* (a
kernel with the types of its tensors, or with a number of its tile) and *statements* (an opcode at a
source line of a kernel). A list ends when its time is spent, or when there is nothing to add.

All of tests/kernels takes hours. After a new kernel it is enough to record its tests and those of
the sample, and to give the sample's seconds and some more. Compiling counts, so record with an
empty TRITON_CACHE_DIR. `make test-oldest` runs the first half of each list. A test of it may fail
there because triton 3.6.0 leaves out a fence (docs/verification.md): move it to the second half.
"""

import argparse
import json
import pathlib
from collections import Counter
from typing import Any

from tilelab.perf.rows.results import write_whole

FOLDER = pathlib.Path(__file__).parents[1] / "ptx_sample"
KIND = 50  # statements that are worth as much as a kind


def chosen(tests: list[dict[str, Any]], seconds: float) -> tuple[list[str], Counter]:
    """The ids of the best tests, the best first, and what they reach and take together."""
    compiling: dict[str, float] = {}
    for test in tests:
        for code, took in test["compiled"].items():
            compiling[code] = max(took, compiling.get(code, 0))
    reached: set[str | int] = set()
    compiled: set[str] = set()
    found, spent = [], 0.0

    def cost(test: dict) -> float:
        new = test["compiled"].keys() - compiled
        return 0.02 + test["seconds"] + sum(compiling[code] for code in new)

    def value(test: dict) -> float:
        kinds = KIND * len(set(test["kinds"]) - reached)
        return (kinds + len(set(test["statements"]) - reached)) / cost(test)

    left = list(tests)
    while left := [test for test in left if value(test) > 0 and spent + cost(test) <= seconds]:
        best = max(left, key=value)
        spent += cost(best)
        found.append(best["id"])
        reached |= {*best["kinds"], *best["statements"]}
        compiled |= best["compiled"].keys()
    kinds = sum(isinstance(what, str) for what in reached)
    return found, Counter(
        tests=len(found), seconds=round(spent), kinds=kinds, statements=len(reached) - kinds
    )


def main(argv: list[str] | None = None) -> None:
    """Write the lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=pathlib.Path, help="files of --record")
    parser.add_argument("--seconds", type=float, default=80, help="CPU time for each target")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for file in args.records for line in file.open()]
    for target in sorted({line["target"] for line in lines}):
        tests = list({line["id"]: line for line in lines if line["target"] == target}.values())
        found, total = chosen(tests, args.seconds)
        every, all_of_them = chosen(tests, float("inf"))
        FOLDER.mkdir(exist_ok=True)
        text = "".join(f"{name}\n" for name in found)
        write_whole(FOLDER / f"{target}.txt", text.encode())
        print(f"{target}: " + ", ".join(f"{n} of {all_of_them[what]} {what}"
                                        for what, n in total.items()))  # fmt: skip


if __name__ == "__main__":
    main()

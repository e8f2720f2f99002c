"""Makes the tables of docs/verification.md: what two tools of other authors say of the kernels.

tests/second_opinions.json has their verdicts. They were asked once and by hand, because each needs
an environment of its own and one of them takes minutes for a kernel. "opinions" has a row for each
kernel, target, dtype and tile:

    tool, version    who was asked
    file, kernel     the file of kernels/ or nets/ and the kernel in it
    target           what it was compiled for
    dtype, tile      of its operands, and the tile in short (perf/rows/ranking.py)
    launches         how many of its launches ttsem executed
    call, grid       the call whose launch sentryward analysed, and the programs of that launch
    verdict          one of VERDICTS
    examined         of a report: whether somebody has looked for its reason
    remarks          that reason, or why there is no verdict
    seconds          what it took, see "about"

"controls" has faults of tests/tools/mutants.py that were planted while ttsem looked. "cuts" has
barriers and waits that were cut out of PTX, one at a time, and what sentryward said.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.tools.mutants import MUTANTS
from tilelab.perf.clock.host_overhead import ROOT
from tilelab.perf.rows.ranking import markdown_table

OPINIONS = ROOT / "tests" / "second_opinions.json"
FACTS = ROOT / "tests" / "compile_facts" / "3.9.0"
VERDICTS = {  # in the words of the tables
    "clean": "clean",
    "unchecked": "right, races not checked",
    "race": "race reported",
    "race_free": "free of races",
    "race_free_on_a_path": "free of races on one path",
    "potential_race": "race reported",
    "unsupported": "not supported",
    "timeout": "out of time",
    "memory_budget_exceeded": "out of memory",
}
REPORTS = ("race", "potential_race")
UNSURE = ("unchecked", "race_free_on_a_path", "unsupported", "timeout", "memory_budget_exceeded")


def tables(path: Path = OPINIONS) -> dict[str, str]:
    """Every table by name, in Markdown."""
    data = json.loads(path.read_text())
    rows = data["opinions"]
    return {
        "asked": asked(rows),
        "second opinions": by_file(rows, compiled_launches(FACTS), faults()),
        "reports": reports(rows),
        "open": unsure(rows),
        "controls": controls(data["controls"]),
        "cuts": cuts(data["cuts"]),
    }


def asked(rows: list[dict]) -> str:
    """A line for each tool: what it was asked about, what it said and what that took."""
    lines = []
    for tool in dict.fromkeys(row["tool"] for row in rows):
        mine = [row for row in rows if row["tool"] == tool]
        targets = sorted({row["target"] for row in mine}, key=lambda target: int(target[3:]))
        lines.append(
            (f"{tool} {mine[0]['version']}", ", ".join(targets),
             len({row["kernel"] for row in mine}), len(mine), verdicts(mine),
             f"{sum(row['seconds'] for row in mine) / 60:.0f}")
        )  # fmt: skip
    head = ("tool", "targets", "kernels", "kernels with tile and dtype", "verdicts", "minutes")
    return markdown_table(head, lines)


def by_file(rows: list[dict], compiled: Counter, planted: Counter) -> str:
    """A line for each file that has kernels.

    Args:
        rows: the opinions.
        compiled: how many launches of a kernel have a compile fact.
        planted: how many faults of a file the mutants plant.
    """
    kernels: dict[str, set[str]] = {}
    for row in rows:
        kernels.setdefault(row["file"], set()).add(row["kernel"])
    lines = []
    for file, names in sorted(kernels.items()):
        folder = "nets" if file == "step" else "kernels"
        mine = [row for row in rows if row["file"] == file]
        opinions = [
            [row for row in mine if row["tool"] == tool and row["target"] in targets]
            for tool, targets in (
                ("ttsem", ("sm_80", "sm_89", "sm_90")),
                ("sentryward", ("sm_80",)),
                ("sentryward", ("sm_100",)),
            )
        ]
        lines.append(
            (f"[{file}.py](../{folder}/{file}.py)", len(names), sum(compiled[k] for k in names),
             planted[f"{file}.py"], *map(verdicts, opinions))
        )  # fmt: skip
    head = (
        *("file", "kernels", "compiled launches", "faults planted"),
        *("ttsem", "sentryward, sm_80", "sentryward, sm_100"),
    )
    return markdown_table(head, lines)


def verdicts(rows: Iterable[dict]) -> str:
    """How often each verdict was given: "3 clean, 1 race reported (false)"."""
    count = Counter(VERDICTS[row["verdict"]] + judgement(row) for row in rows)
    return ", ".join(f"{n} {words}" for words, n in count.most_common()) or "–"


def judgement(row: dict) -> str:
    """What came of a report, in brackets; nothing of another verdict."""
    if row["verdict"] not in REPORTS:
        return ""
    return " (false)" if row["examined"] else " (not examined)"


def reports(rows: Iterable[dict]) -> str:
    """Every report of a race, and what is known of its reason."""
    return _with_remarks(row for row in rows if row["verdict"] in REPORTS)


def unsure(rows: Iterable[dict]) -> str:
    """What a tool judged in part or not at all, and why."""
    return _with_remarks(row for row in rows if row["verdict"] in UNSURE)


def _with_remarks(rows: Iterable[dict]) -> str:
    """A line for each tool, kernel and remark."""
    found: dict[tuple, list[str]] = {}
    for row in rows:
        key = row["tool"], row["kernel"], row["remarks"]
        found.setdefault(key, []).append(f"{row['target']} {row['dtype']} `{row['tile']}`")
    lines = [
        (f"`{kernel}`", tool, "; ".join(dict.fromkeys(where)), remarks)
        for (tool, kernel, remarks), where in found.items()
    ]
    return markdown_table(("kernel", "tool", "target, dtype and tile", "remarks"), lines)


def controls(rows: Iterable[dict]) -> str:
    """What ttsem saw of each planted fault."""
    words = {
        "oob_read": "a read out of bounds",
        "oob_write": "a write out of bounds",
        "race": "a race",
        "wrong": "a wrong result",
    }
    lines = [
        (row["fault"], row["calls"], ", ".join(words[x] for x in row["seen"]) or "**nothing**")
        for row in rows
    ]
    return markdown_table(("planted fault", "calls", "what was seen"), lines)


def cuts(rows: Iterable[dict]) -> str:
    """For each kernel and instruction: how often it was cut, and how often that was reported."""
    count: dict[tuple, Counter] = {}
    for row in rows:
        key = row["kernel"], row["target"], row["tile"], row["instruction"].split()[0]
        count.setdefault(key, Counter())[row["verdict"] != "race_free"] += 1
    lines = [
        (f"`{kernel}`, {target} `{tile}`", f"`{instruction}`", found.total(), found[True])
        for (kernel, target, tile, instruction), found in count.items()
    ]
    return markdown_table(("kernel", "instruction", "cut", "reported"), lines)


def compiled_launches(folder: Path) -> Counter:
    """How many launches of each kernel have a compile fact, over all targets."""
    count: Counter = Counter()
    for path in folder.glob("*.jsonl"):
        count.update(json.loads(line)["kernel"] for line in path.read_text().splitlines())
    return count


def faults() -> Counter:
    """How many faults `make mutants` plants in each file."""
    return Counter(mutant.file for mutant in MUTANTS.values())

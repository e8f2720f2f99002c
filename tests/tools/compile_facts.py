"""What the compiler makes of every launch, as committed facts: `make test` compiles only a few.

    python -m tests.tools.compile_facts            compile every launch, compare with the facts
    python -m tests.tools.compile_facts --write    compile what has no fact, and write the facts

A fact is what the bars of compile_bars.py ask about the machine code of one launch. The facts are
in tests/compile_facts/<version of triton>/<target>.jsonl, one line a launch.

A key finds a fact. It is a hash of the source of the kernel and of all that it uses, the arguments'
types and constants, the options, the target, and triton's version. The source is taken without
comments and docstrings, so a change of words asks for no new facts. If the code that reads the
machine code changes, its facts change too: remove the files and write them anew.

A process has to choose between compiler and interpreter before it imports triton. So launches are
recorded and compiled in processes of their own, one a core: `Worker` starts and asks them.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from collections import defaultdict

from tqdm import tqdm

from tests.tools import compile_bars, compile_cases
from tilelab.perf.compiler import aot
from tilelab.perf.compiler.kernel_source import source_hash
from tilelab.perf.rows import results

# isort: split
import triton  # after the kernels: they decide between interpreter and compiler

FOLDER = pathlib.Path(__file__).parents[1] / "compile_facts"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COMMAND = "make test-compile ARGS=--write"


# --- the files ------------------------------------------------------------------------------------


def path(target):
    return FOLDER / triton.__version__ / f"{target}.jsonl"


def read(target):
    """The committed facts of the installed triton, by key; none where it has no file."""
    if not path(target).exists():
        return {}
    lines = path(target).read_text().splitlines()
    return {fact.pop("key"): fact for fact in map(json.loads, lines)}


def write(target, facts):
    """Write the file whole, in the order of kernels and keys."""
    rows = [fact | {"key": key} for key, fact in facts.items()]
    rows.sort(key=lambda row: (row["kernel"], row["key"]))
    text = "".join(json.dumps(row, separators=(",", ":"), sort_keys=True) + "\n" for row in rows)
    results.write_whole(path(target), text.encode())


# --- in a process that compiles -------------------------------------------------------------------


def key_of(launch, target):
    """The key of a launch: triton's own JIT says how it specialises the arguments."""
    asked = []

    def remember(*, compile, **_):
        asked.append((compile["signature"], compile["configs"], compile["key"]))
        return True  # it need not be compiled

    hook, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, remember
    try:
        aot.compile_launch(launch)
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
    text = repr((triton.__version__, target, source_hash(launch.kernel), asked))
    assert len(asked) == 1 and " at 0x" not in text, text
    return hashlib.sha256(text.encode()).hexdigest()[:16]


KEPT = (  # of what perf/compiler/machine_code.py reads
    "registers", "spills", "shared", "tensor_core", "operands", "serialised", "tma", "load_bytes",
    "store_bytes", "loop_instructions", "instructions",
)  # fmt: skip
TENSOR_CORES = (
    r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"  # in PTX, and in AMD's assembly
)


def fact_of(launch):
    """Compile a launch for the target of `aot.compile_for`, and return its fact.

    Returns:
        what `aot.analyse` says, as far as KEPT has it.
        kernel: its name.
        tensor_cores: the kinds of tensor-core instructions in the assembly.
        dots: how many products of tiles the kernel has.
        ahead: TMA loads for later steps before the innermost loop begins.
        waits: the loop makes the barriers of its loads anew in each step.
        accesses: of a kernel without products for NVIDIA, see `accesses`.
        moved: bytes a thread of those accesses, each once.
    """
    compiled = aot.compile_launch(launch)
    analysis = aot.analyse(compiled)
    fact = {"kernel": launch.kernel.__name__} | {name: analysis[name] for name in KEPT}
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    fact["tensor_cores"] = sorted(set(re.findall(TENSOR_CORES, assembly)))
    fact["dots"] = compiled.asm["ttir"].count("tt.dot ")
    before, _, last = compiled.asm["ttgir"].rpartition("scf.for")  # the innermost, or the last one
    fact["ahead"] = "async_tma_copy_global_to_local" in before
    fact["waits"] = "init_barrier" in last.partition("scf.yield")[0]
    if "ptx" in compiled.asm and not fact["dots"]:
        threads = 32 * compiled.metadata.num_warps
        fact["accesses"], fact["moved"] = accesses(assembly, compiled.asm["ttir"], threads)
    return fact


def accesses(ptx, ttir, threads):
    """How wide the bulk of a kernel's loads and stores are, and the bytes a thread of them.

    The bulk are the accesses of a tile's full size. What one row or one column has (a class, a
    loss, a bias, a sum) is not among them, nor what kernels/optim.py does under a mask, to a
    parameter's last chunk. Which instruction belongs to which access goes by the line of the
    source: Triton's IR says how many elements a load has, and PTX how many bytes an instruction.

    Returns:
        A list in the order of the lines: ("load of 8 x 2 bytes", [16]) is a load of 8 elements a
        thread by instructions of 16 bytes each.
        The bytes a thread that they move, each once.
    """
    found, moved, at = _widths(ptx), 0, []
    for (kind, line), (elements, size) in sorted(_bulk(ttir).items(), key=lambda x: x[0][1]):
        name = f"{kind} of {elements // threads} x {size} bytes"
        at.append([name, sorted(found.get((kind, line), ()))])
        moved += elements * size // threads
    return at, moved


def _bulk(ttir):
    """The loads and stores of most elements: {("load", line): (elements, bytes an element)}."""
    places = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", ttir, re.M))

    def line(place):
        text = places[place]
        if found := re.match(r'"[^"]*":(\d+):', text):
            return int(found[1])
        caller = re.match(r'(?:callsite\(#loc\d* at |"[^"]*"\()#(loc\d*)\)', text)
        return line(caller[1])

    found = []
    pattern = r"tt\.(load|store) ([^:\n]*) : tensor<(\S+?)> loc\(#(loc\d*)\)"
    for kind, operands, type_, place in (m.groups() for m in re.finditer(pattern, ttir)):
        *sizes, element = re.match(r"((?:\d+x)+)!tt\.ptr<\w*?(\d+)>?$", type_.rstrip(">")).groups()
        elements = math.prod(int(n) for n in sizes[0].split("x") if n)
        masked = len(operands.split(",")) > (1 if kind == "load" else 2)
        found.append((kind, line(place), elements, int(element) // 8, masked))
    most = max((elements for _, _, elements, _, _ in found), default=0)
    if not all(masked for *_, masked in found if _[2] == most):  # a branch without masks
        found = [x for x in found if not x[4]]
    return {(kind, at): (n, size) for kind, at, n, size, _ in found if n == most}


# Its own line and its caller's: `inlined_at 1 106 9`, with older tritons `// .. @[ file.py:106:9 ]`
LINE = r"\s*\.loc\s+\d+\s+(\d+)(?:.*(?:inlined_at\s+\d+\s+|@\[ [^:]*:)(\d+))?"


def _widths(ptx):
    """Bytes a thread of the accesses to global memory: {("load", line): {16, ...}}."""
    found, at, in_asm = defaultdict(set), None, False
    for text in ptx.splitlines():
        if "inline asm" in text:  # within it the lines are not the source's
            in_asm = "begin" in text
        elif (place := re.match(LINE, text)) and not in_asm:
            at = int(place[2] or place[1])
        elif access := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s", text):
            kind = "load" if access[1] == "ld" else "store"
            found[kind, at].add(int(access[2] or 1) * int(access[3]) // 8)
    return found


class Launches:
    """Every launch of every case for one target, by key.

    A launch is recorded again whenever it is compiled: all together would hold terabytes.
    """

    def __init__(self, target):
        aot.compile_for(target)
        self.target, self.device = target, aot.device(target)
        self.rows, self.places = [], {}
        for case in compile_cases.cases(self.device):
            for i, launch in enumerate(case.launches(self.device)):
                key = key_of(launch, target)
                self.places.setdefault(key, (case, i))
                constants = {k: v for k, v in launch.meta.items() if k in launch.kernel.arg_names}
                options = {k: v for k, v in launch.meta.items() if k not in constants}
                about = dict(target=target, group=case.group, case=case.name, tile=case.tile)
                about |= dict(dtype=str(case.dtype)[6:], kernel=launch.kernel.__name__)
                self.rows.append(about | dict(constants=constants, options=options, key=key))

    def compile(self, key):
        aot.compile_for(self.target)
        case, i = self.places[key]
        try:
            return fact_of(case.launches(self.device)[i])
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}"[:2000]}


def _serve():
    """Answer questions until stdin ends: a target asks for its launches, with a key for a fact."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints is no answer
    launches = functools.cache(Launches)
    for line in sys.stdin:
        target, key = json.loads(line)
        answer = launches(target).compile(key) if key else launches(target).rows
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


# --- in any process -------------------------------------------------------------------------------


class Worker:
    """A process that compiles. Use as a context manager."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.compile_facts", "--serve"],
            env=os.environ | aot.ENVIRONMENT,
            cwd=pathlib.Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def _ask(self, *question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the compiler ended with {self.process.wait()}, asked {question}")
        return json.loads(answer)

    @functools.cache  # noqa: B019  (there is one in a process)
    def launches(self, target):
        """What is launched on a target: a list of rows, without facts."""
        return self._ask(target, None)

    def fact(self, target, key):
        """Compile one launch; {"error": ...} if it does not compile."""
        return self._ask(target, key)


def rows_of(launches, facts):
    """The launches that have a fact, each with its own."""
    return [row | facts[row["key"]] for row in launches if row["key"] in facts]


def of_part(launches, part):
    """Those of a target's launches that are in the groups of CORE ("sm_90 core"), or the others."""
    if part.split()[0] != "sm_90":
        return launches
    core = part.endswith("core")
    return [row for row in launches if (row["group"] in compile_cases.CORE) == core]


def compile_all(jobs, workers):
    """Yield (target, key, fact) for each (target, key), in the order in which they are done."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Worker()) for _ in range(workers)]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))

        def compile(job):
            worker = idle.pop()
            try:
                return *job, worker.fact(*job)
            finally:
                idle.append(worker)

        done = [pool.submit(compile, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(done):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def main():
    """Compile, compare or write, hold the facts to the bars; return whether anything is wrong."""
    parser = argparse.ArgumentParser(prog="make test-compile", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--write", action="store_true", help="compile what has no fact, and write the facts")
    add("--core", action="store_true", help="only sm_90, for which the oldest triton has facts")
    add("--only", default="", help="only launches whose description has this regular expression")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return _serve()

    with Worker() as worker:
        targets = ("sm_90",) if options.core else TARGETS
        launches = {target: worker.launches(target) for target in targets}
    facts, orphans, wanted = {}, 0, []
    for target, rows in launches.items():
        keys, committed = {row["key"] for row in rows}, read(target)
        facts[target] = {key: fact for key, fact in committed.items() if key in keys}
        orphans += len(committed) - len(facts[target])
        wanted += [row for row in rows if re.search(options.only, compile_bars.describe(row))]
    jobs = list(dict.fromkeys((row["target"], row["key"]) for row in wanted))
    if options.write:
        jobs = [(target, key) for target, key in jobs if key not in facts[target]]

    wrong = compile_jobs(jobs, facts, options.write)
    if orphans and not options.write:
        wrong.append(f"{orphans} facts are of no launch: {COMMAND}")
    for row in (row for row in wanted if row["key"] in facts[row["target"]]):
        row = row | facts[row["target"]][row["key"]]
        wrong += [f"{what}: {compile_bars.describe(row)}" for what in compile_bars.problems(row)]
    print("\n".join(wrong) or f"{len(wanted)} launches, {len(jobs)} compiled: as they should be")
    return bool(wrong)


def compile_jobs(jobs, facts, keep):
    """Compile each (target, key), and say what is wrong; `keep` adds to the facts and writes them.

    They are also written every half a minute and at an interruption: what is in them is not
    compiled again.
    """
    wrong, written = [], time.monotonic()

    def write_all():
        for target in facts if keep else ():
            write(target, facts[target])

    try:
        workers = len(os.sched_getaffinity(0))
        for target, key, fact in tqdm(compile_all(jobs, workers), "compiled", len(jobs)):
            if "error" in fact:
                wrong.append(f"{target} {key} does not compile: {fact['error']}")
            elif keep:
                facts[target][key] = fact
            elif fact != facts[target].get(key):
                wrong.append(f"{target} {key}: {difference(facts[target].get(key), fact)}")
            if time.monotonic() > written + 30:
                write_all()
                written = time.monotonic()
    finally:
        write_all()
    return wrong


def difference(old, new):
    """What a fact says now and said before, in words."""
    if old is None:
        return f"no fact: {COMMAND}"
    changed = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k)]
    return ", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in sorted(changed))


if __name__ == "__main__":
    sys.exit(main())

"""Results files: what a sweep writes and every other command reads. Version 1 of the schema.

JSON lines. A header says on what, with what and when; the rows after it say what was tried and what
came of it:

    {"kind": "header", "schema": 1, "gpu": "NVIDIA H200", "versions": {...}, ...}
    {"kind": "row", "op": "matmul", "mode": "fwd", "tile": {...}, "stage": "screen", ...}
    {"kind": "row", ...}
    {"kind": "header", ...}                                      the sweep was stopped and resumed
    {"kind": "row", ...}

The tables HEADER and ROW are the schema: what is checked when a line is written or read, and what
README.md prints. README.md also says what becomes of a file that was killed, resumed or damaged.
"""

import contextlib
import fcntl
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tilelab.perf.errors import PerfError

SCHEMA = 1


class Field(NamedTuple):
    """A field of a line. One that is `required` may not be missing or null.

    Types are "int", "float" (or an int), "str", "bool", "[float]", "[str]"; a tuple of the strings
    that it may be; or "{str: X}", a dict of X, where "any" is a number, bool, str or null.
    """

    type: str | tuple[str, ...]
    meaning: str
    required: bool = False


MODES = ("fwd", "dgrad", "wgrad", "bwd", "fwdbwd", "step")
STAGES = ("compile", "screen", "final")
BOUNDS = (
    "compute", "power", "memory", "l2", "shared memory", "issue", "latency", "launch",
)  # fmt: skip
KNOWN = ("held to measurements", "by construction only")
STATUSES = ("ok", "wrong", "error", "pruned", "skipped", "predicted")

HEADER = {
    "kind": Field(("header",), "", True),
    "schema": Field("int", "version of this schema, 1", True),
    "created": Field("str", "when the writing began: ISO 8601, UTC", True),
    "command": Field("[str]", "the command line"),
    "gpu": Field("str", "device name; `interpreter`; or `sm_90 (compiled)`, never run", True),
    "target": Field("str", "what the kernels were compiled for: `sm_90`, `gfx942`"),
    "measured": Field("bool", "false: compiled and predicted, nothing was timed", True),
    "driver": Field("str", "version of the GPU's driver"),
    "clocks_mhz": Field("{str: any}", "MHz at the start: `sm`, `memory`, and the limit `sm_max`"),
    "power_limit_w": Field("float", "W"),
    "versions": Field(
        "{str: any}", "of python, torch, triton, numpy, cuda, cudnn and tilelab", True
    ),
    "commit": Field("str", "of this repository"),
    "dirty": Field("bool", "the working tree differed from the commit"),
    "host": Field("{str: any}", "`cpu` (its name) and `cores`"),
    "seed": Field("int", "of the inputs and of the order within the rounds"),
    "note": Field("str", "what the user wants to remember"),
}

ROW = {
    "kind": Field(("row",), "", True),
    # what
    "op": Field("str", "operator", True),
    "mode": Field(MODES, "forward; gradient of x, of the weight, of all; both ways; a step", True),
    "dtype": Field("str", "`float32`, `float16`, `bfloat16`, `float8_e4m3fn` or `int8`", True),
    "precision": Field(("ieee", "tf32"), "of float32 products", True),
    "shape": Field("{str: int}", "sizes, with the keys of the row in perf/work/operators.py", True),
    "shape_name": Field("str", "for people: `resnet50.layer2.0.conv2 n32`"),
    "impl": Field(
        ("tilelab", "torch", "graph", "compile", "inductor"), "ours, or one of the peers", True
    ),
    "tile": Field(
        "{str: any}",
        "block sizes, `num_warps`, `num_stages`; `kernel`, where it is not for the one through "
        "pointers; null for peers",
    ),
    "default": Field("bool", "the tile that `choose_tile` would take here with no tuned table"),
    "tile_op": Field("str", "under which name `choose_tile` looks the tile up"),
    "sizes": Field("{str: int}", "M, N, K that the tile divides"),
    "stage": Field(STAGES, "only compiled; timed briefly; timed in rounds with the best", True),
    "status": Field(
        STATUSES,
        "`predicted`: no GPU was there; `ok` of stage `screen`: timed, but no finalist",
        True,
    ),
    "reason": Field("str", "why it is not ok, one line"),
    "source": Field("str", "hash of the kernel's source"),
    "time": Field("str", "when the row was written: ISO 8601, UTC"),
    # how much work
    "flops": Field("int", "floating-point operations that the mathematics asks for"),
    "bytes": Field("int", "bytes that must be read and written at least"),
    "moved": Field("int", "bytes that its launches read and write at least, intermediates counted"),
    "launches": Field("int", "kernels launched"),
    "kernel": Field("str", "name of the one whose tile it is"),
    "programs": Field("int", "blocks of its launch"),
    "threads": Field("int", "of a block"),
    # what the compiler made of it
    "compile_s": Field("float", "s to compile"),
    "registers": Field("int", "a thread"),
    "spills": Field("int", "bytes a thread, in local memory for want of registers"),
    "shared": Field("int", "bytes of shared memory a block"),
    "tensor_core": Field("str", "widest tensor-core instruction of the main loop"),
    "tensor_cores_in_loop": Field("int", "tensor-core instructions in the main loop"),
    "serialised": Field("bool", "each wgmma waits for the one before"),
    "operands": Field(
        ("shared", "registers", "tensor memory"),
        "where the tensor cores of sm_90 and sm_100 have A from",
    ),
    "load_bytes": Field("int", "bytes of the narrowest load of the main loop, a thread"),
    "store_bytes": Field("int", "bytes of the narrowest store, a thread"),
    "tma": Field("bool", "loads by the tensor memory accelerator"),
    "loop_instructions": Field("int", "instructions of the main loop"),
    "loop_mix": Field("{str: int}", "the same by group: `tensor core`, `load`, `integer`, ..."),
    # how it fits the GPU
    "occupancy": Field("float", "warps resident on an SM, of all it could hold: 0 to 1"),
    "blocks_per_sm": Field("int", "blocks resident on an SM"),
    "limit": Field("str", "what limits them: `registers`, `shared memory`, `warps`, `blocks`"),
    "waves": Field("float", "blocks of the launch, over those that run at once"),
    "wave_efficiency": Field("float", "programs / (SMs x those of the busiest SM): 0 to 1"),
    "padding": Field("float", "work in whole tiles, over the work asked for: 1 or more"),
    "bound": Field(BOUNDS, "what the prediction says it waits for (perf/compiler/prediction.py)"),
    "predicted_s": Field("float", "s a call, predicted"),
    "known": Field(
        KNOWN, "whether others' measurements of such kernels on such GPUs confirm the prediction"
    ),
    "predicted_tflops": Field("float", "10^12 FLOPs a second, predicted"),
    "predicted_gbps": Field("float", "10^9 bytes a second, predicted: bytes / predicted_s"),
    # what was measured
    "samples_s": Field("[float]", "s a call, one a round, in the order of the rounds"),
    "median_s": Field("float", "s a call, median of the samples"),
    "q25_s": Field("float", "s, lower quartile"),
    "q75_s": Field("float", "s, upper quartile"),
    "low_s": Field("float", "s, low end of the median's 95% bootstrap interval"),
    "high_s": Field("float", "s, its high end"),
    "rounds": Field("int", "rounds timed"),
    "race": Field("str", "rows of one race were timed in the same rounds: samples pair by index"),
    "noisy": Field("bool", "the interval had not become narrow when the time was up"),
    "throttled": Field("int", "rounds in which the GPU lowered its clock"),
    "throttle_reasons": Field("[str]", "why: `power cap` is usual for large products"),
    "timer": Field(("graph", "events", "host"), "CUDA graph, CUDA events, or the host's clock"),
    "timer_reason": Field("str", "why a short call is not in a graph"),
    "late": Field("int", "samples that may hold time of the host"),
    "cache": Field(("cold", "hot"), "are the inputs in the L2 cache?"),
    "clock_mhz": Field("float", "MHz, SM clock while it was timed"),
    "joules": Field("float", "J a call"),
    "tflops": Field("float", "10^12 FLOPs a second: flops / median_s"),
    "gbps": Field("float", "10^9 bytes a second: bytes / median_s"),
    "peak_share": Field("float", "of the peak that binds, compute or bandwidth: 0 to 1"),
    "error": Field("float", "relative norm of the difference to a float64 reference"),
    "tolerance": Field("float", "the largest error that is right"),
}

ATTACHED = ("gpu", "measured", "commit")  # what readers give a row of its header
MUST_AGREE = ("gpu", "measured", "driver", "versions.torch", "versions.triton")
_HEADER_START = b'{"kind": "header"'


class Results(NamedTuple):
    """What files hold: their headers, and their rows, each with ATTACHED of its own header."""

    headers: list[dict]
    rows: list[dict]


# -- rows and what identifies them -----------------------------------------------------------------


def key(row: dict) -> tuple:
    """Return what was tried, hashable: rows of one file with the same key are the same attempt."""
    tile, cache = row.get("tile"), row.get("cache") or "cold"
    return *workload(row), row["impl"], tile and _items(tile), row["stage"], cache


def workload(row: dict) -> tuple:
    """Return what was computed, hashable: rows with the same workload are competitors."""
    return row["op"], row["mode"], row["dtype"], row["precision"], _items(row["shape"])


def _items(sizes: dict) -> tuple:
    return tuple(sorted(sizes.items()))


# -- reading ---------------------------------------------------------------------------------------


def read(*paths: str | Path, note: Callable[[str], Any] = print) -> Results:
    """Read results files, or what killed sweeps have left of them, as one; `note` what is left out.

    Of the rows with one key the last one counts; of an operator's mode on a GPU, those of the
    newest kernel source. A file that ends with .gz is unpacked.

    Raises:
        PerfError: for a file that is missing, of another schema, or damaged before its end.
    """
    headers, rows = [], []
    for path in paths:
        lines, _, torn = _parse(path, content_of(path))
        if torn:
            note(f"{path}: left out the unfinished last line, {len(torn)} bytes of a killed run")
        for line in lines:
            if line["kind"] == "header":
                headers.append(line)
            else:
                rows.append(_attached(line, headers[-1]))
    if len(paths) > 1:  # sorting is stable: where times are equal or missing, the order stays
        rows.sort(key=lambda row: row.get("time") or "")
    last = {}
    for row in rows:
        identity = row["gpu"], row["measured"], row.get("source"), key(row)
        last.pop(identity, None)  # so that it comes at the end again, as in the file
        last[identity] = row
    kept, left_out = _newest(list(last.values()))
    if left_out:
        counts = ", ".join(f"{name}: {count}" for name, count in left_out.items())
        note(f"{', '.join(map(str, paths))}: left out rows of older kernel sources ({counts})")
    return Results(headers, kept)


def _attached(row: dict, header: dict) -> dict:
    """Return the row with ATTACHED; a "+" behind the commit: the working tree differed from it."""
    commit = (header.get("commit") or "")[:7] + ("+" if header.get("dirty") else "")
    return {**row, "gpu": header["gpu"], "measured": header["measured"], "commit": commit}


def _newest(rows: list[dict]) -> tuple[list[dict], Counter]:
    """Return the rows to keep, and how many of each operator and mode are left out.

    Numbers of kernels that are gone do not belong beside those of today's. Peers have no source.
    """

    def subject(row):
        return row["gpu"], row["measured"], row["op"], row["mode"]

    newest = {subject(row): row["source"] for row in rows if row.get("source")}
    kept = [row for row in rows if row.get("source") in (None, newest.get(subject(row)))]
    names = [Counter(f"{row['op']} {row['mode']}" for row in some) for some in (rows, kept)]
    return kept, names[0] - names[1]


def content_of(path: str | Path) -> bytes:
    """Return what a file holds, unpacked if its name ends with .gz."""
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if Path(path).suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise PerfError(f"cannot read {path}: {why}") from error


def _parse(path: str | Path, content: bytes) -> tuple[list[dict], int, bytes]:
    """Return the checked lines, the length of what they take, and what a kill left of the last."""
    *ended, torn = content.split(b"\n")
    lines = []
    for number, text in enumerate(ended, start=1):
        lines.append(_line(f"{path}, line {number}", text, first=not lines))
    if not lines and torn[: len(_HEADER_START)] != _HEADER_START[: len(torn)]:
        raise PerfError(f"{path} is not a results file: it does not begin with a header")
    return lines, len(content) - len(torn), torn


def _line(place: str, text: bytes, first: bool) -> dict:
    """Return one line as a dict, or raise what is wrong with it."""
    try:
        line = json.loads(text)
        fields = {"header": HEADER, "row": ROW}[line["kind"]]
    except (ValueError, KeyError, TypeError):
        line, fields = {}, None
    if first and fields is not HEADER:
        raise PerfError(f"{place}: not a results file: it begins with no header")
    if fields is HEADER and line.get("schema") != SCHEMA:
        known = f"this version of tilelab knows schema {SCHEMA}"
        raise PerfError(f"{place}: schema {line.get('schema')}, but {known}")
    problem = _problem(line, fields) if fields else "not a line of JSON with a kind"
    if problem:
        raise PerfError(f"{place}: damaged: {problem}")
    return line


def _problem(line: dict, fields: dict[str, Field]) -> str | None:
    """Return what is wrong with the types of a line. Unknown fields are a newer version's."""
    for name, field in fields.items():
        value = line.get(name)
        if value is None:
            if field.required:
                return f"{name} is missing"
        elif not _is(value, field.type):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
            kind = field.type if isinstance(field.type, str) else " or ".join(field.type)
            return f"{name} must be {kind}, got {shown}"
    return None


def _is(value: Any, kind: str | tuple[str, ...]) -> bool:
    """Return whether a value that JSON gave is of this kind."""
    if isinstance(kind, tuple):
        return value in kind if isinstance(value, str) else False
    if kind.startswith("["):
        return isinstance(value, list) and all(_is(item, kind[1:-1]) for item in value)
    if kind.startswith("{"):
        item_kind = kind.removeprefix("{str: ").removesuffix("}")
        return isinstance(value, dict) and all(_is(item, item_kind) for item in value.values())
    if kind == "any":
        return value is None or isinstance(value, int | float | str)
    types = {"int": int, "float": int | float, "str": str, "bool": bool}[kind]
    return isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))


# -- writing ---------------------------------------------------------------------------------------


class Writer:
    """Appends to a results file, new or begun: a header now, then rows as they are known.

    Each row is one write of a whole line, flushed to the disk before `write` returns. A process
    that dies loses the row it was writing and no other; the next Writer cuts that off, says so to
    `note` and goes on. `rows` are those that the file had, of every source, each with ATTACHED.

    Raises:
        PerfError: if the file is not a results file or is damaged before its end; if it is of
            another GPU, driver, torch or triton; if another process is writing to it; or if it
            cannot be written.
    """

    def __init__(self, path: str | Path, header: dict, note: Callable[[str], Any] = print) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise PerfError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._lock()
            self._resume(header, note)
            self._write(self._encoded({**header, "kind": "header", "schema": SCHEMA}, HEADER))
        except BaseException:
            self.close()
            raise

    def write(self, row: dict) -> None:
        """Append a row. Numbers may be NumPy's; one that is not finite is written as null.

        Raises:
            PerfError: for an unknown field or a wrong type, or if the file cannot be written. The
                file is then as it was before.
        """
        self.write_all([row])

    def write_all(self, rows: Iterable[dict]) -> None:
        """Append rows that are known together, in one write: all of them or, if it fails, none.

        A write waits for the disk, for milliseconds: with thousands of rows that counts.
        """
        self._write(b"".join(self._encoded({**row, "kind": "row"}, ROW) for row in rows))

    def find(self, row: dict, source: str | None = None) -> dict | None:
        """Return the row that the file had for this attempt (of this source), or None."""
        return self._done.get((key(row), source))

    def close(self) -> None:
        """Close the file. Everything is on the disk already."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PerfError(f"another process is writing to {self.path}") from error
        except OSError:  # a file system without locks
            pass

    def _resume(self, header: dict, note: Callable[[str], Any]) -> None:
        """Check what the file holds, cut off a torn line, and remember the rows."""
        lines, length, torn = _parse(self.path, content_of(self.path))
        self.rows: list[dict] = []
        self._done: dict[tuple, dict] = {}
        about = {}
        for line in lines:
            if line["kind"] == "header":
                about = line
                self._check_same(line, header)
                continue
            row = _attached(line, about)
            self.rows.append(row)
            self._done[key(row), None] = self._done[key(row), row.get("source")] = row
        if torn:
            os.ftruncate(self._file, length)
            note(f"{self.path}: cut off the unfinished last line, {len(torn)} bytes")

    def _check_same(self, old: dict, new: dict) -> None:
        for name in MUST_AGREE:
            was, now = _get(old, name), _get(new, name)
            if was != now:
                raise PerfError(
                    f"{self.path} has results of {name} {was!r}, this is {now!r}: they do not "
                    "belong in one file, choose another"
                )

    def _encoded(self, line: dict, fields: dict[str, Field]) -> bytes:
        """Return a line of the file, or raise what is wrong with it."""
        line = {"kind": line["kind"], **line}
        unknown = sorted(line.keys() - fields.keys() - set(ATTACHED))
        if unknown:
            raise PerfError(f"no such field in the schema of results: {', '.join(unknown)}")
        text = json.dumps({name: line[name] for name in fields if name in line}, default=_plain)
        # What is not finite becomes null here, and what was a tuple or of NumPy becomes JSON's.
        line = json.loads(text, parse_constant=lambda _: None)
        problem = _problem(line, fields)
        if problem:
            raise PerfError(f"a result that does not fit the schema: {problem}")
        return json.dumps(line).encode() + b"\n"

    def _write(self, data: bytes) -> None:
        """Append all of the data or, if that fails, nothing."""
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a full disk takes a part, and then raises
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except BaseException as error:
            os.ftruncate(self._file, before)
            if isinstance(error, OSError):
                raise PerfError(f"cannot write {self.path}: {error.strerror}") from error
            raise


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python's, for json."""
    if hasattr(value, "item"):
        return value.item()
    raise PerfError(f"a result must be plain data, got {type(value).__name__}")


def _get(header: dict, name: str) -> Any:
    """Return a field, or one within a field: "versions.torch"."""
    for part in name.split("."):
        header = (header or {}).get(part)
    return header


LOCK_S = 60  # to merge rows into a file takes milliseconds


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within this context no other process is in one of the same file: to read, merge, replace it.

    The lock is a file of its own, `.<name>.lock` beside it, because a file that is replaced cannot
    be locked itself.

    Raises:
        PerfError: if another process holds it for a minute, or if it cannot be made.
    """
    import filelock  # reading results needs nothing but perf

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_S)
        lock.acquire()
    except filelock.Timeout:
        raise PerfError(f"another process has been writing {path} for {LOCK_S} s") from None
    except OSError as error:
        raise PerfError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, content: bytes) -> None:
    """Write any file, its folder too, so that nobody ever sees half of it (nets/files.py).

    Raises:
        PerfError: if it cannot be written.
    """
    from tilelab.nets import files  # reading results needs nothing but perf

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, content)
    except OSError as error:
        raise PerfError(f"cannot write {path}: {error.strerror or error}") from error

"""Where kernels run, and how long one call takes there.

`CudaDevice` is a GPU (NVIDIA's, or AMD's through the same torch.cuda). `HostDevice` is the CPU with
Triton's interpreter, for dry runs of everything around a measurement. Both have the same methods,
and the simulated device of the tests has them too. perf/clock/timing.py decides how often to
measure. This file makes one good sample, a time per call:

    prepare(calls) -> runner     warms up and decides how the calls are timed
    runner.sample()              seconds per call, over about a millisecond of work
    runner.run()                 the same work without a clock, for warming up and for energy
    runner.close()               gives the memory back

`calls` are functions of no arguments. They do the same work on different data, because a GPU's
cache must not hold what the next call reads. They return the tensors that they make. A runner keeps
as many results as there are calls: if a result were freed at once, the next call would write to its
memory again, and those writes would stay in the cache.

A GPU's clocks and power limit are read and never set.
"""

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tilelab.perf.errors import PerfError
from tilelab.perf.work import gpus

Calls = Sequence[Callable[[], Any]]

GRAPH_BELOW = 100e-6  # seconds a call: under this a launch costs as much as a kernel takes
SAMPLE = 1e-3  # seconds of work in a sample: 2000 times the resolution of an event
REPLAY = 5e-3  # the most seconds of work in one graph
LAUNCHES = 20  # the least calls in a graph

# Bits of nvmlDeviceGetCurrentClocksEventReasons that say that the GPU is slower than it could be.
# Left out: idle (0x1), clocks that somebody set (0x2) and clocks for a display (0x100).
THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability limit",
}


def current_device() -> "CudaDevice | HostDevice":
    """The device that the kernels use: the GPU if torch sees one and TRITON_INTERPRET is not 1."""
    interpret = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return HostDevice() if interpret or not torch.cuda.is_available() else CudaDevice()


def cache_label(calls: Calls, cache: str | None) -> str:
    """What a row says of the cache: as the caller knows it, or by whether the inputs rotate."""
    if not calls:
        raise PerfError("nothing to measure: no calls were given")
    return cache or ("cold" if len(calls) > 1 else "hot")


def first_line(error: BaseException) -> str:
    """An error as one line: its type and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


class Nvml:
    """What the driver's management library knows of one GPU. Each answer is None where it cannot.

    `module` is pynvml (the package nvidia-ml-py), or None where it is not installed. torch numbers
    the GPUs that CUDA_VISIBLE_DEVICES leaves, NVML numbers all of them: so a GPU is found by its
    identity, torch's `uuid` (with neither "GPU-" nor "MIG-" before it) or the PCI address `bus`.
    `missing` says why there are no answers, or is None.
    """

    def __init__(self, module: Any, uuid: str, bus: str | None) -> None:
        self.module, self.handle, self.missing = module, None, None
        if module is None:
            self.missing = "nvidia-ml-py is not installed"
            return
        try:
            module.nvmlInit()
        except Exception as error:  # no driver, another driver, no permission
            self.missing = f"NVML does not start: {error}"
            return
        ways = [(module.nvmlDeviceGetHandleByUUID, f"{kind}-{uuid}") for kind in ("GPU", "MIG")]
        if bus is not None:
            ways.append((module.nvmlDeviceGetHandleByPciBusId, bus))
        for find, identity in ways:
            # A handle of this GPU, or an error. None of them may end a measurement.
            with contextlib.suppress(Exception):
                self.handle = find(identity)
                return
        self.missing = f"NVML does not know the GPU {uuid}"

    def ask(self, function: str, *args: Any) -> Any:
        """What a function of pynvml says of the GPU; None where the GPU or the driver lacks it.

        A data-centre GPU and a laptop's answer different questions, so every error means "no
        answer": a number that is missing must not stop a sweep.
        """
        with contextlib.suppress(Exception):
            of = [self.handle] if function.startswith("nvmlDevice") else []
            return getattr(self.module, function)(*of, *args) if self.handle is not None else None
        return None


def _nvml(properties: Any) -> Nvml:
    """NVML for the GPU with these properties."""
    try:
        import pynvml
    except ImportError:
        pynvml = None
    places = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    bus = None if None in places else "{:08x}:{:02x}:{:02x}.0".format(*places)
    return Nvml(pynvml, str(getattr(properties, "uuid", "")), bus)


class Device:
    """What the two devices have in common.

    Attributes:
        name: as torch gives it, "NVIDIA H200".
        torch_device: what to create tensors on.
        target: what the kernels are compiled for, "sm_90" or "gfx942".
        l2: bytes of the last cache before the memory.
        memory_total: bytes.
        timer_name: how a call is timed if nothing better fits.
        nvml_missing: why clocks, throttling and energy are not known, or None.
    """

    nvml_missing: str | None = "there is no GPU"
    _nvml = Nvml(None, "", None)

    def header(self) -> dict[str, Any]:
        """The fields of a results file's header that are about the GPU."""
        limit = self._nvml.ask("nvmlDeviceGetEnforcedPowerLimit")
        clocks = dict(
            sm=self._clock("nvmlDeviceGetClockInfo", "SM"),
            memory=self._clock("nvmlDeviceGetClockInfo", "MEM"),
            sm_max=self._clock("nvmlDeviceGetMaxClockInfo", "SM"),
        )
        return dict(
            gpu=self.name,
            target=self.target,
            driver=self._nvml.ask("nvmlSystemGetDriverVersion"),
            clocks_mhz=None if None in clocks.values() else clocks,
            power_limit_w=None if limit is None else limit / 1000,
        )

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""
        return time.monotonic()

    def processes(self) -> int | None:
        """How many processes compute on the GPU, this one included; None if that is not known."""
        found = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses")
        return None if found is None else len(found)

    def clock_mhz(self) -> float | None:
        """The clock of the SMs, now."""
        return self._clock("nvmlDeviceGetClockInfo", "SM")

    def throttle_reasons(self) -> list[str]:
        """Why the GPU is slower than it could be, now; empty where that is not known."""
        mask = self._nvml.ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        return [reason for bit, reason in THROTTLE.items() if mask & bit]

    def energy_j(self) -> float | None:
        """Joules that the GPU has used; only differences mean something."""
        millijoules = self._nvml.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def _clock(self, function: str, which: str) -> int | None:
        return self._nvml.ask(function, getattr(self._nvml.module, f"NVML_CLOCK_{which}", None))


class CudaDevice(Device):
    """The first GPU that torch sees: CUDA_VISIBLE_DEVICES chooses another."""

    torch_device = "cuda"
    timer_name = "events"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise PerfError("torch sees no GPU: `tilelab doctor` says what works without")
        self.index = 0
        properties = torch.cuda.get_device_properties(self.index)
        hip = torch.version.hip is not None
        self.name = properties.name
        self.target = (
            properties.gcnArchName.split(":")[0]
            if hip
            else f"sm_{properties.major}{properties.minor}"
        )
        # An MI300X has a cache beyond the one that HIP calls its L2: the table knows the larger.
        known = gpus.find_device(self.name)
        self.l2 = max(properties.L2_cache_size, known.l2 if known else 0)
        self.memory_total = properties.total_memory
        if hip:
            self.nvml_missing = "AMD's GPUs have no NVML"
        else:
            self._nvml = _nvml(properties)
            self.nvml_missing = self._nvml.missing
        self._stream = torch.cuda.Stream(self.index)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Within this context torch works on the stream that everything is measured on.

        One stream for all of it, because a graph cannot be captured on the default stream; because
        cuBLAS takes a workspace for each stream it meets, which must exist before a capture; and
        because autograd runs a gradient on the stream that its forward pass ran on, which has to be
        the one that is captured: make inputs and forward passes within this context.
        """
        outer = torch.cuda.current_stream(self.index)
        nested = outer == self._stream
        with torch.cuda.device(self.index), torch.cuda.stream(self._stream):
            if not nested:
                self._stream.wait_stream(outer)
            yield
        if not nested:
            outer.wait_stream(self._stream)

    def prepare(self, calls: Calls, cache: str | None = None) -> "CudaRunner":
        """Warm the calls up, and decide how they are timed. An error of a call is raised.

        `cache` is "cold" or "hot", if the number of calls does not say it: one call whose data are
        larger than the cache is cold.
        """
        return CudaRunner(self, calls, cache)

    def synchronize(self) -> None:
        """Wait for the GPU. Raises RuntimeError if a kernel has failed."""
        torch.cuda.synchronize(self.index)

    def memory_free(self) -> int:
        """Bytes that can still be allocated: the driver's, and what torch keeps for reuse."""
        kept = torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
        return torch.cuda.mem_get_info(self.index)[0] + kept


# A capture that failed leaves torch's allocators with a reference to its graph, which must not
# dangle: such graphs are kept for as long as the process lives. They hold no memory on the GPU.
_abandoned: list[torch.cuda.CUDAGraph] = []


class CudaRunner:
    """Times calls on a GPU. `CudaDevice.prepare` makes it.

    Short calls (under 100 us) are captured in a CUDA graph and replayed: launched one by one, a
    kernel of 5 us would wait for the host, which needs 10 to 50 us for each. A graph holds calls on
    all the inputs in turn, so its kernels find a cold cache as separate launches would. What cannot
    be captured, and what is long enough, is launched as any program would, between two events.

    The host is kept out of both. An event's time is taken when the GPU reaches it: if the GPU were
    idle, it would pass the first event at once and then wait for the host to bring the kernels. So
    each sample begins with a kernel that only spins, and the host queues everything behind it. That
    this worked is checked: when the host is done, the GPU must not have reached the first event.
    """

    def __init__(self, device: CudaDevice, calls: Calls, cache: str | None) -> None:
        self.cache = cache_label(calls, cache)
        self.timer, self.late = "events", 0  # `late` samples may hold time of the host
        self.reason = None  # why a call that is short enough for a graph is not in one
        self._device, self._calls, self._turn = device, list(calls), 0
        # A single call is hot, or larger than the cache: its result may lie where the last one did.
        self._kept: deque = deque(maxlen=len(calls) if len(calls) > 1 else 0)
        self._graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []
        self._delay, self._longest_delay = 0.0, 0.0
        try:
            with device.stream():
                self._start = torch.cuda.Event(enable_timing=True)
                self._end = torch.cuda.Event(enable_timing=True)
                self._warm_up()
                estimate = self._estimate()
                if estimate < GRAPH_BELOW:
                    self._use_graph(estimate)
                # At most 100: what is queued beyond about a thousand launches makes the host wait.
                count = min(100, max(1, math.ceil(SAMPLE / max(estimate, 1e-6))))
                if self._graphs or count != self._count:
                    self._count = count
                    self._time_host()
        except BaseException:
            self.close()
            raise

    def sample(self) -> float:
        """Seconds per call."""
        with self._device.stream():
            return self._measure()

    def run(self) -> int:
        """Queue as many calls as a sample has, and do not wait: their number."""
        with self._device.stream():
            return self._enqueue()

    def close(self) -> None:
        """Wait for the GPU, and give memory back."""
        with contextlib.suppress(RuntimeError):  # a GPU that a kernel broke
            self._device.synchronize()
        for graph, _ in self._graphs:
            graph.reset()
        self._graphs, self._calls = [], []
        self._kept.clear()

    def _warm_up(self) -> None:
        """Each call once: what is compiled, loaded, chosen or allocated the first time is past.

        On the stream of the capture, and on all inputs: Triton compiles for the alignment of an
        address, and a module that had to be loaded during a capture would end it.
        """
        self._count = len(self._calls)
        self._enqueue()
        self._device.synchronize()

    def _estimate(self) -> float:
        self._count = 1
        self._time_host()
        estimate = self._measure()
        if estimate < 10 * SAMPLE:
            self._count = 5
            self._time_host()
            estimate = min(estimate, self._measure())
        return estimate

    def _use_graph(self, estimate: float) -> None:
        try:
            self._capture(estimate)
            self._time_host()
            measured = self._measure()
            if measured < estimate / 2:  # the estimate had time of the host in it
                self._graphs.clear()
                self._capture(measured)
        except Exception as error:
            # capture_end complains of the damage; what caused it is the error before.
            self._graphs.clear()
            self.reason = f"not in a graph: {first_line(error.__context__ or error)}"
            self._device.synchronize()  # raises if it was more than a capture that failed
            return
        self.timer = "graph"

    def _capture(self, estimate: float) -> None:
        """Graphs of at least 20 calls and a millisecond, which go over all inputs equally often.

        Many inputs of slow calls make several graphs of 5 ms at most, replayed in turn. Each keeps
        its results until it ends, so that they have memory of their own in the graph's pool.
        """
        sets = len(self._calls)
        launches = max(LAUNCHES, math.ceil(SAMPLE / max(estimate, 1e-6)))
        launches = math.ceil(launches / sets) * sets
        parts = min(sets, math.ceil(launches * estimate / REPLAY)) or 1
        edges = [launches * part // parts for part in range(parts + 1)]
        self._kept.clear()
        for first, last in zip(edges, edges[1:], strict=False):
            pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
            kept: deque = deque(maxlen=self._kept.maxlen)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self._device._stream):
                    for i in range(first, last):
                        kept.append(self._calls[i % sets]())
            except BaseException:
                _abandon(graph, pool, self._device.index)
                raise
            self._graphs.append((graph, last - first))
        for graph, _ in self._graphs:  # the first replay also uploads the graph
            graph.replay()
        self._device.synchronize()

    def _enqueue(self) -> int:
        """Put one sample's calls on the current stream; their number."""
        if self._graphs:
            graph, count = self._graphs[self._turn % len(self._graphs)]
            self._turn += 1
            graph.replay()
            return count
        for _ in range(self._count):
            self._kept.append(self._calls[self._turn % len(self._calls)]())
            self._turn += 1
        return self._count

    def _time_host(self) -> None:
        """How long the host needs to queue a sample, and so how long the GPU must spin."""
        fastest = math.inf
        for _ in range(2):
            began = time.perf_counter()
            self._enqueue()
            fastest = min(fastest, time.perf_counter() - began)
            self._device.synchronize()
            if time.perf_counter() - began > REPLAY:
                break  # once is enough where it is little beside the work
        self._delay = min(2 * fastest + 20e-6, 20e-3)
        self._longest_delay = min(8 * self._delay, 20e-3)

    def _measure(self) -> float:
        """One sample, behind a delay; again, behind a longer one, if the host was too slow for it.

        What waits for the GPU itself (an `.item()`, say) can never be queued ahead. The delay
        reaches its limit, and from then on such a sample is taken as it is, and counted as late.
        """
        while True:
            # _sleep counts the SM's cycles. No GPU is much faster than 2.5 GHz, so this is at least
            # the time that was asked for; at idle clocks it is longer, which does no harm.
            torch.cuda._sleep(int(self._delay * 2.5e9))
            self._start.record()
            count = self._enqueue()
            self._end.record()
            late = self._start.query()
            self._end.synchronize()
            if not late:
                break
            if self._delay >= self._longest_delay:
                self.late += 1
                break
            self._delay = min(2 * self._delay, self._longest_delay)
        return self._start.elapsed_time(self._end) * 1e-3 / count


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], index: int) -> None:
    """Bring torch's allocator out of a capture that failed, and give its memory back.

    If the driver called the capture off, `capture_end` raises before it tells the allocator, which
    from then on would believe that a capture is under way, and free nothing when memory runs out.
    torch has no public way to say that it is over.
    """
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except Exception:  # it had been told: an operator refused in Python, and the graph is whole
        graph.reset()
        return
    _abandoned.append(graph)
    with contextlib.suppress(Exception):
        torch._C._cuda_releasePool(index, pool)


class HostDevice(Device):
    """The CPU, where Triton's interpreter runs the kernels: for dry runs. Times mean nothing."""

    name = "interpreter"
    torch_device = "cpu"
    target = None
    l2 = 0
    timer_name = "host"

    def __init__(self) -> None:
        self.memory_total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the CPU has no streams."""
        return contextlib.nullcontext()

    def prepare(self, calls: Calls, cache: str | None = None) -> "HostRunner":
        """As `CudaDevice.prepare`; only the first call is warmed up: each may take seconds."""
        return HostRunner(self, calls, cache)

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def memory_free(self) -> int:
        """Bytes of RAM that are not in use."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class HostRunner:
    """Times calls with the host's clock. Made by `HostDevice.prepare`; as `CudaRunner`."""

    timer = "host"
    reason = None
    late = 0

    def __init__(self, device: HostDevice, calls: Calls, cache: str | None) -> None:
        self.cache = cache_label(calls, cache)
        self._calls, self._turn, self._count = list(calls), 0, 1
        estimate = self.sample()
        if estimate < SAMPLE:  # the first call is slower than the others
            estimate = self.sample()
        self._count = max(1, math.ceil(SAMPLE / max(estimate, 1e-7)))

    def sample(self) -> float:
        """Seconds per call."""
        began = time.perf_counter()
        count = self.run()
        return (time.perf_counter() - began) / count

    def run(self) -> int:
        """Do as many calls as a sample has: their number."""
        for _ in range(self._count):
            self._calls[self._turn % len(self._calls)]()
            self._turn += 1
        return self._count

    def close(self) -> None:
        """Let go of the calls and of the data that they hold."""
        self._calls = []

"""Devices: the host for real; a GPU simulated at the level of torch.cuda, with two clocks.

The simulated torch.cuda has a host that needs time to launch and a GPU that works through a queue,
events that read the GPU's clock, and graphs. So it shows whether times of the host leak into a
sample. It cannot show that the calls to torch.cuda are right: tests marked `gpu` do.
"""

import contextlib
import types

import pytest
import torch

from tilelab.perf.clock import devices as module
from tilelab.perf.clock.devices import CudaDevice, HostDevice, Nvml, current_device
from tilelab.perf.errors import PerfError

LAUNCH = 20e-6  # of the host, for a kernel launched by itself


class Sim:
    """torch.cuda's time: `host` is now, `gpu` is when the queue will be empty."""

    def __init__(self):
        self.host = self.gpu = 0.0
        self.capturing = None
        self.failing_end = False  # whether the driver has called the capture off
        self.told, self.streams = [], []
        self.fail_on_synchronize = False
        self.underway = False  # whether the allocator believes in a capture

    def launch(self, seconds, host=LAUNCH):
        if self.capturing is not None:
            self.capturing.append(seconds)
            return
        self.host += host
        self.gpu = max(self.gpu, self.host) + seconds

    def synchronize(self, *_):
        if self.fail_on_synchronize:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.capturing is not None:
            self.failing_end = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.host = max(self.host, self.gpu)

    def kernel(self, seconds, launches=1):
        """A call: returns what it made, as calls do."""

        def call():
            for _ in range(launches):
                self.launch(seconds / launches)
            return object()

        return call


@pytest.fixture
def sim(monkeypatch):
    """A GPU. `sim.graphs` lists the captures, each a list of the kernels' times."""
    sim = Sim()
    sim.graphs = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            sim.host += 1e-6
            self.time = max(sim.gpu, sim.host)

        def query(self):
            return self.time <= sim.host

        def synchronize(self):
            sim.host = max(sim.host, self.time)

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    class Graph:
        def __init__(self):
            self.kernels, self.replays, self.alive = None, 0, True
            sim.graphs.append(self)

        def replay(self):
            assert self.alive
            self.replays += 1
            sim.host += 10e-6 + 50e-9 * len(self.kernels)
            sim.gpu = max(sim.gpu, sim.host) + sum(self.kernels)

        def reset(self):
            self.alive = False

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        assert sim.streams[-1] is stream  # warmed up on the stream of the capture
        sim.synchronize()
        sim.capturing, sim.underway = [], True
        try:
            yield
        finally:
            graph.kernels, sim.capturing = sim.capturing, None
            if sim.failing_end:
                sim.failing_end = False
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            sim.underway = False

    class Stream:
        def __init__(self, index):
            self.index = index

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def use_stream(stream):
        sim.streams.append(stream)
        try:
            yield
        finally:
            sim.streams.pop()

    sim.streams.append(Stream(0))  # the default stream

    properties = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, L2_cache_size=60 << 20, total_memory=141 * 10**9,
        uuid="0123", pci_bus_id=0x3B, pci_domain_id=0, pci_device_id=0,
    )  # fmt: skip
    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": Stream,
        "stream": use_stream,
        "device": lambda index: contextlib.nullcontext(),
        "current_stream": lambda index: sim.streams[-1],
        "graph_pool_handle": lambda: ("pool", len(sim.graphs)),
        "_sleep": lambda cycles: sim.launch(cycles / 1.98e9, host=5e-6),
        "synchronize": sim.synchronize,
        "is_available": lambda: True,
        "get_device_properties": lambda index: properties,
        "memory_reserved": lambda index: 30,
        "memory_allocated": lambda index: 10,
        "mem_get_info": lambda index: (100, 1000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)

    def end_allocation(index, pool):
        if not sim.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        sim.underway = False
        sim.told.append(("end", index, pool))

    def release(index, pool):
        sim.told.append(("release", index, pool))

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    monkeypatch.setattr(module, "_abandoned", [])
    monkeypatch.setattr(
        module, "time", types.SimpleNamespace(perf_counter=lambda: sim.host, monotonic=lambda: 0.0)
    )
    monkeypatch.setattr(torch.version, "hip", None)
    return sim


def test_what_a_gpu_says_of_itself(sim):
    device = CudaDevice()
    assert device.name == "NVIDIA H200" and device.target == "sm_90"
    assert device.l2 == 60 << 20 and device.torch_device == "cuda"
    assert device.memory_free() == 120  # what torch keeps for reuse is free too
    assert set(device.header()) == {"gpu", "target", "driver", "clocks_mhz", "power_limit_w"}


def test_an_amd_gpu_has_no_nvml_but_works(sim, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = torch.cuda.get_device_properties(0)
    properties.name, properties.gcnArchName = "AMD Instinct MI300X", "gfx942:sramecc+:xnack-"
    properties.L2_cache_size = 4 << 20
    device = CudaDevice()
    assert device.target == "gfx942" and device.l2 == 256 << 20  # the Infinity Cache
    assert device.clock_mhz() is None and device.energy_j() is None and device.processes() is None
    assert device.throttle_reasons() == [] and device.nvml_missing
    assert device.header()["clocks_mhz"] is None
    assert device.prepare([sim.kernel(5e-6)]).sample() == pytest.approx(5e-6, rel=0.05)


def test_a_gpu_that_is_not_there(sim, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PerfError, match="sees no GPU"):
        CudaDevice()


# Which timer, and whether it tells the truth.


@pytest.mark.parametrize("seconds", [1e-6, 5e-6, 30e-6, 90e-6])
@pytest.mark.parametrize("sets", [1, 3, 7])
def test_short_kernels_are_in_a_graph(sim, seconds, sets):
    runner = CudaDevice().prepare([sim.kernel(seconds)] * sets)
    assert runner.timer == "graph" and runner.reason is None and runner.late == 0
    assert runner.cache == ("cold" if sets > 1 else "hot")
    for _ in range(3):
        assert runner.sample() == pytest.approx(seconds, rel=0.01)
    (graph,) = [graph for graph in sim.graphs if graph.alive]
    assert len(graph.kernels) >= 20 and len(graph.kernels) % sets == 0
    assert 1e-3 <= sum(graph.kernels) <= 5e-3
    assert runner.run() == len(graph.kernels)


@pytest.mark.parametrize("seconds", [110e-6, 0.5e-3, 2e-3, 0.3])
@pytest.mark.parametrize("launches", [1, 5])
def test_longer_kernels_are_launched_one_by_one(sim, seconds, launches):
    runner = CudaDevice().prepare([sim.kernel(seconds, launches)] * 3)
    assert runner.timer == "events" and not sim.graphs
    assert runner.sample() == pytest.approx(seconds, rel=0.01)
    assert runner.late == 0 and runner.reason is None
    assert 1e-3 <= runner.run() * seconds < max(1.6e-3, seconds * 1.01)


def test_host_time_does_not_leak_into_a_sample(sim):
    """200 launches of 1 us each in a call: the GPU needs 200 us, the host 4 ms."""
    runner = CudaDevice().prepare([sim.kernel(200e-6, launches=200)])
    assert runner.timer == "events" and runner.late == 0
    assert runner.sample() == pytest.approx(200e-6, rel=0.01)
    assert CudaDevice().prepare([sim.kernel(5e-6)]).sample() == pytest.approx(5e-6, rel=0.01)


def test_a_host_that_falls_behind_is_noticed_and_the_sample_repeated(sim):
    runner = CudaDevice().prepare([sim.kernel(200e-6)])
    query, slow = torch.cuda.Event.query, iter([True])
    torch.cuda.Event.query = lambda event: next(slow, False) or query(event)
    before = runner._delay
    assert runner.sample() == pytest.approx(200e-6, rel=0.01)
    assert runner.late == 0 and runner._delay == 2 * before


def test_a_call_that_waits_for_the_gpu_is_timed_and_counted_as_late(sim):
    def call():
        sim.launch(150e-6)
        sim.synchronize()

    runner = CudaDevice().prepare([call])
    assert runner.timer == "events"
    count = runner.late
    assert 150e-6 <= runner.sample() <= 200e-6  # host time is in it
    assert runner.late == count + 1


def test_a_call_that_waits_cannot_be_captured(sim):
    def call():
        sim.launch(20e-6)
        sim.synchronize()

    runner = CudaDevice().prepare([call])
    assert runner.timer == "events"
    assert "not permitted when stream is capturing" in runner.reason  # the cause, not the damage
    assert runner.reason.startswith("not in a graph: RuntimeError: CUDA error")
    assert len(module._abandoned) == 1 and not sim.underway
    assert sim.told == [("end", 0, ("pool", 0)), ("release", 0, ("pool", 0))]
    assert sim.graphs[0].alive  # the host's allocator still refers to it
    assert runner.sample() > 0


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_operator_that_refuses_to_be_captured_is_timed_by_events(sim, error):
    def call():
        if sim.capturing is not None:
            raise error("a step cannot be captured: the host counts")
        sim.launch(20e-6)

    runner = CudaDevice().prepare([call])
    assert runner.timer == "events"
    assert runner.reason == f"not in a graph: {error.__name__}: a step cannot be captured: " + (
        "the host counts"
    )
    assert runner.sample() == pytest.approx(20e-6, rel=0.05)
    assert runner.late == 0 and runner.run() in (50, 51)
    assert not sim.graphs[0].alive and not module._abandoned and not sim.told


def test_an_estimate_with_host_time_in_it_is_corrected(sim, monkeypatch):
    """A graph that turns out much shorter than was thought is made again, long enough."""
    monkeypatch.setattr(module.CudaRunner, "_estimate", lambda self: 90e-6)
    runner = CudaDevice().prepare([sim.kernel(2e-6)])
    assert sum(runner._graphs[0][0].kernels) >= 1e-3
    assert runner.sample() == pytest.approx(2e-6, rel=0.01)


def test_many_sets_of_slow_calls_make_several_graphs(sim):
    times = [50e-6 + i * 0.01e-6 for i in range(400)]
    runner = CudaDevice().prepare([sim.kernel(t) for t in times])
    graphs = [graph for graph in sim.graphs if graph.alive]
    assert len(graphs) == 5  # of 4 ms
    assert [t for graph in graphs for t in graph.kernels] == pytest.approx(times)  # each set once
    assert all(sum(graph.kernels) <= 5e-3 for graph in graphs)
    before = [graph.replays for graph in graphs]
    samples = [runner.sample() for _ in range(10)]
    assert [graph.replays - b for graph, b in zip(graphs, before, strict=True)] == [2] * 5
    assert samples[:5] == pytest.approx(samples[5:]) and len(set(samples[:5])) == 5


# What is rotated, and what is kept.


def test_the_calls_take_turns_across_samples(sim):
    seen = []

    def call(i):
        seen.append(i)
        sim.launch(0.4e-3)

    runner = CudaDevice().prepare([lambda i=i: call(i) for i in range(5)])
    assert seen[:5] == [0, 1, 2, 3, 4]  # each is warmed up
    seen.clear()
    for _ in range(5):
        runner.sample()
    assert len(seen) == 15  # three in a sample
    assert all((b - a) % 5 == 1 for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("seconds", [5e-6, 0.4e-3])
@pytest.mark.parametrize("sets", [1, 4])
def test_results_are_kept_for_one_rotation(sim, seconds, sets):
    """So that the next call writes to other memory. One call may write over its last result."""
    alive, most, captured = set(), [], []

    class Result:
        def __init__(self):
            alive.add(id(self))
            (most if sim.capturing is None else captured).append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    def call():
        sim.launch(seconds)
        return Result()

    runner = CudaDevice().prepare([call] * sets)
    runner.sample()
    expected = sets + 1 if sets > 1 else 1  # and no more than that: memory is finite
    assert max(most) == expected and max(captured, default=expected) == expected
    runner.close()
    assert not alive


def test_close_gives_everything_back(sim):
    runner = CudaDevice().prepare([sim.kernel(5e-6)] * 3)
    (graph,) = sim.graphs
    runner.close()
    assert not graph.alive and not runner._calls
    runner.close()  # twice does no harm
    sim.fail_on_synchronize = True
    runner.close()  # nor does a GPU that is broken


def test_a_call_that_fails_fails_the_preparation(sim):
    def call():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        CudaDevice().prepare([call])
    assert len(sim.streams) == 1  # torch is back on the stream that it was on


def test_a_broken_gpu_is_not_taken_for_a_capture_that_failed(sim):
    def call():
        if sim.capturing is not None:
            sim.fail_on_synchronize = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        sim.launch(5e-6)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        CudaDevice().prepare([call])


def test_the_caller_may_know_better_whether_the_cache_is_cold(sim):
    assert CudaDevice().prepare([sim.kernel(1e-3)], "cold").cache == "cold"
    assert CudaDevice().prepare([sim.kernel(1e-3)] * 2, "hot").cache == "hot"
    with pytest.raises(PerfError, match="no calls"):
        CudaDevice().prepare([])


# NVML.


class FakePynvml(types.SimpleNamespace):
    """As much of pynvml as is asked; `NVML_CLOCK_*` as nvml.h numbers them."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, **functions):
        super().__init__(
            **{
                "nvmlInit": lambda: None,
                "nvmlDeviceGetHandleByUUID": self.by_uuid,
                "nvmlDeviceGetHandleByPciBusId": self.fails,
                "nvmlSystemGetDriverVersion": lambda: "580.1",
                "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 3201}[kind],
                "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 3201}[kind],
                "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
                "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_345,
                "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1, 2],
                "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x24 | 0x3,
                **functions,
            }
        )

    @staticmethod
    def fails(*_):
        raise RuntimeError("Not Supported")

    @staticmethod
    def by_uuid(uuid):
        if uuid != "GPU-ab":
            raise RuntimeError("Not Found")
        return "handle"


def device_with(pynvml):
    """A device with this NVML; the host has as many methods as a GPU."""
    device = HostDevice()
    device._nvml = Nvml(pynvml, "ab", None)
    return device


def test_nvml_answers_in_plain_units():
    device = device_with(FakePynvml())
    header = device.header()
    assert device._nvml.missing is None and header["driver"] == "580.1"
    assert header["clocks_mhz"] == dict(sm=1755, memory=3201, sm_max=1980)
    assert device.clock_mhz() == 1755 and header["power_limit_w"] == 700.0
    assert device.energy_j() == 12.345 and device.processes() == 2
    assert device.throttle_reasons() == ["power cap", "thermal (software)"]  # idle and set: no


def test_a_gpu_is_found_by_its_identity():
    """CUDA_VISIBLE_DEVICES renumbers what torch sees, and NVML does not know."""
    asked = []

    def find(way, good):
        def handle(identity):
            asked.append(identity)
            return "handle" if identity == good else FakePynvml.fails()

        return {way: handle}

    uuid, bus = "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId"
    assert Nvml(FakePynvml(**find(uuid, "MIG-cd")), "cd", "0:1:2.0").handle == "handle"
    assert asked == ["GPU-cd", "MIG-cd"]
    assert Nvml(FakePynvml(**find(bus, "0:1:2.0")), "cd", "0:1:2.0").handle == "handle"
    lost = Nvml(FakePynvml(), "cd", None)
    assert lost.handle is None and lost.missing == "NVML does not know the GPU cd"


def test_what_nvml_cannot_say_is_none():
    broken = {name: FakePynvml.fails for name in vars(FakePynvml()) if name.startswith("nvmlD")}
    for function in ("nvmlDeviceGetHandleByUUID", "nvmlInit"):
        broken.pop(function, None)
    for pynvml in (
        FakePynvml(**broken, nvmlSystemGetDriverVersion=FakePynvml.fails),
        FakePynvml(nvmlInit=FakePynvml.fails),
        None,
    ):
        device = device_with(pynvml)
        assert device.clock_mhz() is device.energy_j() is device.processes() is None
        assert device.throttle_reasons() == []
        assert [*device.header().values()] == ["interpreter", None, None, None, None]
    assert "not installed" in device._nvml.missing


def test_every_name_is_in_pynvml():
    """nvidia-ml-py as it is, without a driver: the names, and the numbers of the bits."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in vars(FakePynvml()):
        assert callable(getattr(pynvml, name))
    assert pynvml.NVML_CLOCK_SM == 1 and pynvml.NVML_CLOCK_MEM == 2
    left_out = (
        pynvml.nvmlClocksEventReasonGpuIdle
        | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
        | pynvml.nvmlClocksEventReasonDisplayClockSetting
    )
    assert sum(module.THROTTLE) & left_out == 0
    assert pynvml.nvmlClocksEventReasonAll & ~left_out & ~sum(module.THROTTLE) == 0
    assert pynvml.nvmlClocksEventReasonSwPowerCap == 0x4
    assert pynvml.nvmlClocksEventReasonHwThermalSlowdown == 0x40


def test_nvml_of_a_machine_without_a_driver_is_missing(sim):
    device = CudaDevice()  # simulated, with pynvml as it is installed here, or not
    if device.nvml_missing is None:
        pytest.skip("this machine has a driver, which is asked for a GPU that does not exist")
    assert device.clock_mhz() is None and device.throttle_reasons() == []


# The host.


def test_the_host_has_what_a_gpu_has():
    host = HostDevice()
    for name in dir(CudaDevice):
        assert name.startswith("_") or hasattr(host, name), name
    assert set(host.header()) == {"gpu", "target", "driver", "clocks_mhz", "power_limit_w"}
    assert host.header()["gpu"] == "interpreter" and host.target is None
    assert host.memory_free() > 0 and host.now() <= host.now()
    with host.stream():
        host.synchronize()


def test_the_host_times_calls():
    seen = []
    runner = HostDevice().prepare([lambda i=i: seen.append(i) for i in range(3)])
    assert runner.timer == "host" and runner.cache == "cold"
    assert 0 < runner.sample() < 1e-3 and runner.run() > 10
    assert all((b - a) % 3 == 1 for a, b in zip(seen, seen[1:], strict=False))
    runner.close()


def test_a_slow_call_on_the_host_is_not_repeated(monkeypatch):
    count, clock = [0], [0.0]

    def call():
        count[0] += 1
        clock[0] += 2.0

    monkeypatch.setattr(
        module, "time", types.SimpleNamespace(perf_counter=lambda: clock[0], monotonic=None)
    )
    runner = HostDevice().prepare([call, call])
    assert count[0] == 1
    assert runner.sample() == 2.0 and count[0] == 2


def test_here(sim, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(current_device(), HostDevice)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert isinstance(current_device(), CudaDevice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(current_device(), HostDevice)


# On a GPU.


def gpu_copies(device, sets, size=2**20):
    with device.stream():
        inputs = [torch.rand(size, device="cuda") for _ in range(sets)]
    return [lambda x=x: x + 1 for x in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize("sets", [1, 30])
def test_gpu_short_kernels(sets):
    device = CudaDevice()
    runner = device.prepare(gpu_copies(device, sets))
    assert runner.timer == "graph", runner.reason
    assert 1e-6 < runner.sample() < 100e-6 and runner.late == 0
    before = torch.cuda.memory_reserved()
    runner.close()
    for _ in range(5):
        device.prepare(gpu_copies(device, sets)).close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
def test_gpu_long_kernels_and_a_graph_that_fails():
    device = CudaDevice()
    runner = device.prepare(gpu_copies(device, 1, 2**28))
    assert runner.timer == "events" and 1e-4 < runner.sample() < 1
    runner.close()
    x = torch.ones(10, device="cuda")
    for _ in range(3):  # and the next capture is not hurt by it
        runner = device.prepare([lambda: (x + 1).sum().item()])
        assert runner.timer == "events" and "not in a graph" in runner.reason
        assert runner.sample() > 0
        runner.close()
        assert device.prepare(gpu_copies(device, 2)).timer == "graph"


@pytest.mark.gpu
def test_gpu_graph_and_events_agree():
    """A kernel of some 100 us, timed both ways."""
    device = CudaDevice()
    calls = gpu_copies(device, 2, 2**25)
    runner = device.prepare(calls)
    first = min(runner.sample() for _ in range(20))
    below, module.GRAPH_BELOW = module.GRAPH_BELOW, 1.0 if runner.timer == "events" else 0.0
    try:
        other = device.prepare(calls)
    finally:
        module.GRAPH_BELOW = below
    assert other.timer != runner.timer
    assert min(other.sample() for _ in range(20)) == pytest.approx(first, rel=0.05)


@pytest.mark.gpu
def test_gpu_a_gradient_can_be_captured():
    device = CudaDevice()
    with device.stream():
        x = torch.rand(64, 64, device="cuda", requires_grad=True)
        y, dy = torch.relu(x), torch.ones(64, 64, device="cuda")
    runner = device.prepare([lambda: torch.autograd.grad(y, x, dy, retain_graph=True)])
    assert runner.timer == "graph", runner.reason

"""perf/compiler/occupancy.py against NVIDIA's own calculator, on ten thousand random kernels."""

import doctest
import importlib.util
import pathlib
import random
import shutil
import site
import subprocess

import pytest

from tilelab.perf.compiler import occupancy
from tilelab.perf.compiler.occupancy import Occupancy
from tilelab.perf.work import gpus

NVIDIA = [target for target in gpus.LIMITS if target.startswith("sm_")]

# The calculator as NVIDIA ships it: asked for every line of stdin, it prints how many blocks fit
# and, as one bit each, what limits them.
CALCULATOR = r"""
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"

int main() {
    int cc, warps, shared_sm, shared_block, reserved, threads, registers, shared;
    while (std::scanf("%d %d %d %d %d %d %d %d", &cc, &warps, &shared_sm, &shared_block, &reserved,
                      &threads, &registers, &shared) == 8) {
        cudaOccDeviceProp device;
        device.computeMajor = cc / 10;
        device.computeMinor = cc % 10;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = 32 * warps;
        device.regsPerBlock = 65536;
        device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 * 1024;
        device.sharedMemPerBlockOptin = shared_block;
        device.sharedMemPerMultiprocessor = shared_sm;
        device.reservedSharedMemPerBlock = reserved;
        device.numSms = 1;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = INT_MAX;
        kernel.numRegs = registers;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = shared;  // as Triton's launcher sets it
        kernel.numBlockBarriers = 1;
        cudaOccDeviceState state;
        cudaOccResult result;
        cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
            &result, &device, &kernel, &state, threads, shared);
        if (error == CUDA_OCC_SUCCESS)
            std::printf("%d %u\n", result.activeBlocksPerMultiprocessor, result.limitingFactors);
        else
            std::printf("error %d\n", error);
    }
}
"""
BITS = {0x01: "warps", 0x02: "registers", 0x04: "shared memory", 0x08: "blocks"}


def header() -> pathlib.Path | None:
    """Of NVIDIA's own package if a CUDA build of torch has brought it; triton ships a copy."""
    folders = [pathlib.Path(path) for path in site.getsitepackages()]
    if triton := importlib.util.find_spec("triton"):
        folders += map(pathlib.Path, triton.submodule_search_locations)
    places = ["nvidia/cu1?/include", "nvidia/cuda_runtime/include", "backends/nvidia/include"]
    found = [f for x in folders for place in places for f in x.glob(f"{place}/cuda_occupancy.h")]
    return found[0] if found else None


@pytest.fixture(scope="module")
def calculator(tmp_path_factory):
    """NVIDIA's answers to a list of cases (target, threads, registers, shared)."""
    gxx, path = shutil.which("g++"), header()
    if gxx is None:
        pytest.skip("no g++ to compile cuda_occupancy.h with")
    if path is None:
        pytest.skip("no cuda_occupancy.h: neither triton nor nvidia-cuda-runtime has brought it")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "main.cpp").write_text(CALCULATOR)
    program = folder / "calculator"
    build = [gxx, "-O1", "-I", path.parent, "-o", program, folder / "main.cpp"]
    subprocess.run(build, check=True)

    def ask(cases):
        lines = []
        for target, threads, registers, shared in cases:
            limits = gpus.LIMITS[target]
            reserved = limits.shared_reserved
            device = (limits.warps, limits.shared, limits.shared - reserved, reserved)
            cc = target.removeprefix("sm_")
            lines.append(" ".join(map(str, (cc, *device, threads, registers, shared))))
        run = subprocess.run(
            [program], input="\n".join(lines), capture_output=True, text=True, check=True
        )
        answers = run.stdout.splitlines()
        assert len(answers) == len(cases)
        return [tuple(map(int, answer.split())) for answer in answers]  # an error is not an int

    return ask


def random_case(rng: random.Random) -> tuple[str, int, int, int]:
    target = rng.choice(NVIDIA)
    # A third where Triton lives, the rest anywhere, past the limits too.
    threads = 32 << rng.randrange(6) if rng.random() < 0.4 else rng.randrange(1, 1100)
    registers = rng.randrange(16, 256) if rng.random() < 0.7 else rng.randrange(0, 300)
    top = gpus.LIMITS[target].shared - gpus.LIMITS[target].shared_reserved
    shared = rng.choice(
        [0, rng.randrange(0, 4096), rng.randrange(0, top), top, top + 1, top + rng.randrange(9999)]
    )
    return target, threads, registers, shared


def test_equals_nvidias_calculator(calculator):
    rng = random.Random(0)
    cases = [random_case(rng) for _ in range(10_000)]
    limits = set()
    for case, (blocks, bits) in zip(cases, calculator(cases), strict=True):
        ours = occupancy.occupancy(*case)
        assert ours.blocks == blocks, (case, ours, blocks)
        # On Hopper and later a block's one barrier never binds before the limit on blocks does.
        binding = {name for bit, name in BITS.items() if bits & bit}
        limit = ours.limit.removeprefix("does not fit: ").replace("threads", "warps")
        assert limit in binding, (case, ours, binding)
        limits.add(ours.limit)
    # The cases reach every answer there is, so none agreed for want of a question.
    assert limits == {
        *("warps", "registers", "shared memory", "blocks"),
        *("does not fit: registers", "does not fit: shared memory", "does not fit: threads"),
    }


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # A full SM: nothing but the slots for warps limits it.
        (("sm_90", 256, 32, 0), Occupancy(8, 1.0, "warps")),
        # The same kernel fills an A100 but not the smaller SM of a 4090.
        (("sm_80", 256, 40, 0), Occupancy(6, 0.75, "registers")),
        (("sm_89", 256, 40, 0), Occupancy(6, 1.0, "warps")),
        # Small blocks: 32 of them leave half the slots empty.
        (("sm_90", 32, 16, 0), Occupancy(32, 0.5, "blocks")),
        # Triton's large tile on Hopper: 147 KiB, so one block, whatever its registers.
        (("sm_90", 256, 128, 147 * 1024), Occupancy(1, 0.125, "shared memory")),
        # The 1 KiB that the driver takes is counted: 2 x 114 KiB would be all there is.
        (("sm_90", 128, 64, 113 * 1024), Occupancy(2, 0.125, "shared memory")),
        (("sm_90", 128, 64, 114 * 1024), Occupancy(1, 0.0625, "shared memory")),
        (("sm_80", 128, 64, 163 * 1024), Occupancy(1, 0.0625, "shared memory")),
        (("sm_80", 128, 64, 163 * 1024 + 1), Occupancy(0, 0.0, "does not fit: shared memory")),
        (("sm_90", 1024, 65, 0), Occupancy(0, 0.0, "does not fit: registers")),
        (("sm_90", 1056, 16, 0), Occupancy(0, 0.0, "does not fit: threads")),
        # A partition of 16384 registers holds five warps of 96: 20 on the SM, and not 21.
        (("sm_90", 32, 96, 0), Occupancy(20, 0.3125, "registers")),
    ],
)
def test_worked_examples(case, expected):
    assert occupancy.occupancy(*case) == expected


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "waves", "limit"),
    [
        # 512 registers a lane and SIMD: 64 of them leave room for 8 waves, the most there can be.
        (256, 64, 0, 32, "warps"),
        (256, 65, 0, 28, "registers"),  # rounded up to 72: 7 waves a SIMD
        (256, 81, 0, 20, "registers"),  # to 88: 5 waves; 84 would leave room for 6
        (256, 128, 0, 16, "registers"),
        (256, 256, 0, 8, "registers"),
        (256, 512, 0, 4, "registers"),
        (512, 512, 0, 0, "does not fit: registers"),  # two waves a SIMD, but room for one
        (256, 513, 0, 0, "does not fit: registers"),
        (256, 64, 32 * 1024, 8, "shared memory"),
        (256, 64, 32 * 1024 + 1, 4, "shared memory"),
        (256, 64, 64 * 1024, 4, "shared memory"),
        (256, 64, 64 * 1024 + 1, 0, "does not fit: shared memory"),
    ],
)
def test_amd(threads, registers, shared, waves, limit):
    # By hand, from the sources that gpus.py names; there is no calculator to ask.
    ours = occupancy.occupancy("gfx942", threads, registers, shared)
    assert (ours.fraction, ours.limit) == (waves / 32, limit)


def test_the_docstrings_example():
    assert doctest.testmod(occupancy).failed == 0

"""What each GPU can do at most: its peaks, its memory, and what fits on one of its SMs.

A peak is not typed in but derived: SMs x clock x operations a clock. A slip in one of them then
shows, because tests/perf/test_gpus.py holds every peak within 1% of the vendor's published figure.
All peaks are dense (no structured sparsity) and accumulate in 32 bits, as the kernels do. A GPU
that is not here has no known peaks. Close relatives (PCIe, NVL, laptop) differ in clocks or memory,
and are not guessed.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tilelab.perf.errors import PerfError

MIB = 2**20
KIB = 2**10

KINDS = dict(float32="fp32", float16="fp16", bfloat16="bf16", float8_e4m3fn="fp8", int8="int8")


def kind(dtype: str, precision: str = "ieee") -> str:
    """The kind of arithmetic that a dtype is multiplied in; of float32 also "tf32"."""
    return "tf32" if (dtype, precision) == ("float32", "tf32") else KINDS[dtype]


class GPU(NamedTuple):
    """One model of a GPU."""

    name: str  # the short key, "h200"
    title: str  # the vendor's name and form factor
    target: str  # what it is compiled for, "sm_90" or "gfx942"
    device_names: tuple[str, ...]  # what torch and NVML call it; nothing else is taken for it
    sms: int  # streaming multiprocessors (AMD: compute units)
    clock_mhz: float  # of the vendor's tensor-core peaks
    fma_clock_mhz: float  # of the vendor's fp32 peak
    # Operations a clock and SM, by kind; a multiply-add counts as two. "fp32" is what the ordinary
    # cores do. Kinds that the GPU lacks are missing.
    rate: Mapping[str, int]
    bandwidth: float  # of its memory, bytes/s
    l2: int  # bytes of the last cache before memory, which a cold measurement has to overflow
    source: str  # the vendor's documents and their addresses
    ceiling: float = 1.0  # share of the peak that the best libraries reach

    def peak(self, kind: str) -> float | None:
        """FLOP/s (int8: operations/s) of a kind at most; None if the GPU lacks it."""
        clock_mhz = self.fma_clock_mhz if kind == "fp32" else self.clock_mhz
        return self.sms * clock_mhz * 1e6 * self.rate[kind] if kind in self.rate else None


# NVIDIA quotes the tensor cores of Hopper and of the B200 at a lower clock than their fp32: 132 SMs
# x 4096 give 989.4 TFLOP/s at 1830 MHz, 132 x 256 give 66.9 at 1980 MHz, the highest boost clock.
HOPPER = dict(bf16=4096, fp16=4096, tf32=2048, fp8=8192, int8=8192, fp32=256)

_GPUS = [
    GPU(
        name="a100",
        title="NVIDIA A100 80GB SXM",
        target="sm_80",
        device_names=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "A100-SXM-80GB"),
        sms=108,
        clock_mhz=1410,
        fma_clock_mhz=1410,
        rate=dict(bf16=2048, fp16=2048, tf32=1024, int8=4096, fp32=128),
        bandwidth=2.039e12,
        l2=40 * MIB,
        source="NVIDIA A100 Tensor Core GPU datasheet, "
        "https://www.nvidia.com/en-us/data-center/a100/; "
        "NVIDIA A100 Tensor Core GPU Architecture (white paper), https://images.nvidia.com/"
        "aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
    ),
    GPU(
        name="h100",
        title="NVIDIA H100 SXM",
        target="sm_90",
        device_names=("NVIDIA H100 80GB HBM3",),
        sms=132,
        clock_mhz=1830,
        fma_clock_mhz=1980,
        rate=HOPPER,
        bandwidth=3.35e12,
        l2=50 * MIB,
        source="NVIDIA H100 Tensor Core GPU datasheet, "
        "https://www.nvidia.com/en-us/data-center/h100/; "
        "NVIDIA H100 Tensor Core GPU Architecture (white paper), "
        "https://resources.nvidia.com/en-us-tensor-core",
    ),
    GPU(
        name="h200",
        title="NVIDIA H200 SXM",
        target="sm_90",
        device_names=("NVIDIA H200",),
        sms=132,
        clock_mhz=1830,
        fma_clock_mhz=1980,
        rate=HOPPER,
        bandwidth=4.8e12,
        l2=50 * MIB,
        source="NVIDIA H200 Tensor Core GPU datasheet, https://www.nvidia.com/en-us/data-center/h200/",
    ),
    GPU(
        name="b200",
        title="NVIDIA B200 SXM (HGX)",
        target="sm_100",
        device_names=("NVIDIA B200",),
        sms=148,
        clock_mhz=1860,
        fma_clock_mhz=1980,
        rate=dict(bf16=8192, fp16=8192, tf32=4096, fp8=16384, int8=16384, fp32=256),
        bandwidth=8e12,
        l2=126 * MIB,
        source="NVIDIA HGX platform, specifications of HGX B200 (eight GPUs, with sparsity), "
        "https://www.nvidia.com/en-us/data-center/hgx/; NVIDIA Blackwell Tuning Guide (L2), "
        "https://docs.nvidia.com/cuda/blackwell-tuning-guide/",
    ),
    GPU(
        name="mi300x",
        title="AMD Instinct MI300X",
        target="gfx942",
        device_names=("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
        sms=304,
        clock_mhz=2100,
        fma_clock_mhz=2100,
        rate=dict(bf16=2048, fp16=2048, tf32=1024, fp8=4096, int8=4096, fp32=256),
        bandwidth=5.3e12,
        l2=256 * MIB,  # the Infinity Cache, which all share; each of the eight dies has 4 MiB of L2
        source="AMD Instinct MI300X Accelerator data sheet, https://www.amd.com/content/dam/amd/en/"
        "documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
    ),
    GPU(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090",
        target="sm_89",
        device_names=("NVIDIA GeForce RTX 4090",),
        sms=128,
        clock_mhz=2520,
        fma_clock_mhz=2520,
        rate=dict(bf16=512, fp16=512, tf32=256, fp8=1024, int8=2048, fp32=256),
        bandwidth=1.008e12,
        l2=72 * MIB,
        source="NVIDIA Ada GPU Architecture (white paper, version 2), https://images.nvidia.com/"
        "aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
]
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _GPUS}

# The GPU that stands for a target in predictions.
TARGETS = {
    "sm_80": "a100",
    "sm_89": "rtx4090",
    "sm_90": "h200",
    "sm_100": "b200",
    "gfx942": "mi300x",
}


def find_device(device_name: str) -> GPU | None:
    """The GPU that torch or NVML calls `device_name`; None if its peaks are not known.

    The whole name has to match: an "H100 PCIe", an "H200 NVL" or a slice of a GPU (MIG) is not the
    card whose name it begins with.
    """
    return next((gpu for gpu in _GPUS if device_name in gpu.device_names), None)


def find(text: str) -> GPU:
    """The GPU of a short name ("h200"), a target ("sm_90") or a device name ("NVIDIA H200")."""
    key = text.lower()
    gpu = GPUS.get(key) or GPUS.get(TARGETS.get(key, "")) or find_device(text)
    if gpu is None:
        raise PerfError(
            f"no peaks are known for {text!r}; known: {', '.join(GPUS)}, the targets "
            f"{', '.join(TARGETS)}, and the device names "
            f"{', '.join(gpu.device_names[0] for gpu in _GPUS)}"
        )
    return gpu


# --- what fits on one SM: the input of perf/compiler/occupancy.py --------------------------------


class Limits(NamedTuple):
    """What one SM (AMD: compute unit) of a target holds, and in which portions it gives it out."""

    warp: int  # threads of a warp (AMD: wave)
    warps: int  # resident warps
    blocks: int  # resident blocks
    registers: int  # 32-bit registers, of all partitions together
    registers_per_thread: int  # that a thread may have
    register_granule: int  # a warp's registers are rounded up to a multiple of this
    shared: int  # bytes of shared memory
    shared_reserved: int  # bytes that the system takes for itself in each block
    shared_granule: int  # a block's bytes, the reserved ones with them, are rounded up to this


THREADS_PER_BLOCK = 1024
PARTITIONS = 4  # of an SM: a warp lives in one of them, and each has its share of the registers


def _nvidia(warps: int, blocks: int, shared_kib: int) -> Limits:
    return Limits(
        warp=32, warps=warps, blocks=blocks, registers=64 * KIB, registers_per_thread=256,
        register_granule=256, shared=shared_kib * KIB, shared_reserved=1 * KIB, shared_granule=128,
    )  # fmt: skip


# NVIDIA CUDA C++ Programming Guide, specifications per compute capability,
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/; cuda_occupancy.h of the toolkit.
# AMD Instinct MI300 Instruction Set Architecture Reference Guide, https://www.amd.com/content/dam/
# amd/en/documents/instinct-tech-docs/instruction-set-architectures/
# amd-instinct-mi300-cdna3-instruction-set-architecture.pdf; waves and granules: LLVM,
# llvm/lib/Target/AMDGPU/Utils/AMDGPUBaseInfo.cpp (IsaInfo), https://github.com/llvm/llvm-project
LIMITS: dict[str, Limits] = {
    "sm_80": _nvidia(warps=64, blocks=32, shared_kib=164),
    "sm_89": _nvidia(warps=48, blocks=24, shared_kib=100),
    "sm_90": _nvidia(warps=64, blocks=32, shared_kib=228),
    "sm_100": _nvidia(warps=64, blocks=32, shared_kib=228),
    # 512 registers a lane and SIMD, of which a wave takes multiples of 8: for 64 lanes, 512.
    "gfx942": Limits(
        warp=64, warps=32, blocks=32, registers=4 * 512 * 64, registers_per_thread=512,
        register_granule=8 * 64, shared=64 * KIB, shared_reserved=0, shared_granule=512,
    ),
}  # fmt: skip

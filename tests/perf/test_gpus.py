"""perf/work/gpus.py: what is derived is what the vendors publish; no card is taken for another."""

import subprocess
import sys

import pytest

from tilelab.perf.errors import PerfError
from tilelab.perf.work import gpus

# Dense TFLOP/s (TOP/s for int8) as published, in the documents that each `source` names. NVIDIA
# prints sparse figures, of which these are the halves, and for the B200 those of eight GPUs.
PUBLISHED = {
    "a100": dict(bf16=312, fp16=312, tf32=156, fp8=None, int8=624, fp32=19.5),
    "h100": dict(bf16=1979 / 2, fp16=1979 / 2, tf32=989 / 2, fp8=3958 / 2, int8=3958 / 2, fp32=67),
    "h200": dict(bf16=1979 / 2, fp16=1979 / 2, tf32=989 / 2, fp8=3958 / 2, int8=3958 / 2, fp32=67),
    "b200": dict(
        bf16=36e3 / 16,
        fp16=36e3 / 16,
        tf32=18e3 / 16,
        fp8=72e3 / 16,
        int8=72e3 / 16,
        fp32=600 / 8,
    ),
    "mi300x": dict(bf16=1307.4, fp16=1307.4, tf32=653.7, fp8=2614.9, int8=2614.9, fp32=163.4),
    "rtx4090": dict(bf16=165.2, fp16=165.2, tf32=82.6, fp8=330.3, int8=660.6, fp32=82.6),
}
# As sold: bandwidth of the memory, TB/s.
BANDWIDTH = {
    "a100": 2.039,
    "h100": 3.35,
    "h200": 4.8,
    "b200": 8,
    "mi300x": 5.3,
    "rtx4090": 1.008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_derived_peaks_are_the_published_ones(name):
    assert PUBLISHED.keys() == gpus.GPUS.keys()
    for kind, published in PUBLISHED[name].items():
        derived = gpus.GPUS[name].peak(kind)
        if published is None:
            assert derived is None, kind
        else:
            assert derived == pytest.approx(published * 1e12, rel=0.01), kind


@pytest.mark.parametrize("name", BANDWIDTH)
def test_memory(name):
    gpu = gpus.GPUS[name]
    assert gpu.bandwidth == pytest.approx(BANDWIDTH[name] * 1e12)
    assert 30 * 2**20 < gpu.l2 < 300 * 2**20


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda gpu: gpu.name)
def test_every_gpu_is_complete(gpu):
    assert "https://" in gpu.source
    assert gpu.target in gpus.TARGETS and gpu.target in gpus.LIMITS
    assert set(gpu.rate) <= {*gpus.KINDS.values(), "tf32"}
    assert gpu is gpus.find(gpu.name)


def test_the_gpu_of_a_target_is_compiled_for_that_target():
    for target, name in gpus.TARGETS.items():
        assert gpus.GPUS[name].target == target


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h200", "h200"),
        ("H200", "h200"),
        ("sm_80", "a100"),
        ("sm_89", "rtx4090"),
        ("sm_90", "h200"),
        ("sm_100", "b200"),
        ("gfx942", "mi300x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("A100-SXM4-80GB", "a100"),  # drivers before 470 left the vendor out
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_find(text, name):
    assert gpus.find(text).name == name


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 PCIe",  # 114 SMs
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H800",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB",  # 1.6 TB/s
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Instinct MI300A",
        "Tesla T4",
        "",
    ],
)
def test_a_relative_is_not_taken_for_the_card(device):
    assert gpus.find_device(device) is None


def test_find_device_takes_device_names_only():
    assert gpus.find_device("NVIDIA H200") is gpus.GPUS["h200"]
    assert gpus.find_device("h200") is None
    assert gpus.find_device("sm_90") is None


@pytest.mark.parametrize("text", ["h300", "sm_70", "NVIDIA H100 PCIe", ""])
def test_an_unknown_gpu_is_one_line_that_lists_the_known(text):
    with pytest.raises(PerfError, match="known: a100, h100, .*sm_90.*NVIDIA H200") as error:
        gpus.find(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "precision", "kind"),
    [
        ("float32", "ieee", "fp32"),
        ("float32", "tf32", "tf32"),
        ("float16", "ieee", "fp16"),
        ("bfloat16", "ieee", "bf16"),
        ("bfloat16", "tf32", "bf16"),  # the switch for TF32 is on, and means float32 only
    ],
)
def test_kind(dtype, precision, kind):
    assert gpus.kind(dtype, precision) == kind


def test_imports_neither_triton_nor_torch():
    code = "import sys; from tilelab.perf.compiler import machine_code, occupancy; "
    code += "assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""perf/compiler/machine_code.py, on what triton compiles for GPUs that are not here.

What a loop has to contain follows from the tile: its tensor-core instructions do exactly the work
of one step, its loads bring exactly the operands of one step. So a loop that is found wrongly, cut
short or counted twice is found out, with every version of the compiler.

The kernels are compiled in a process of their own, `python -m tests.perf.test_machine_code TARGET
FOLDER`, since one has to choose between compiler and interpreter before it imports triton.
"""

import contextlib
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tilelab.perf.compiler import machine_code
from tilelab.perf.compiler.machine_code import Instruction
from tilelab.perf.errors import PerfError

ROOT = pathlib.Path(__file__).parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def tile(m, n, k, warps, stages=3):
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, num_warps=warps, num_stages=stages)


# What is multiplied, with which tile, in what.
PRODUCTS = {
    "default": ((4096, 4096, 4096), tile(128, 128, 32, 8), "bf16"),
    "wide": ((4096, 4096, 4096), tile(128, 256, 64, 8), "bf16"),
    "transposed B": ((4096, 4096, 4096), tile(128, 256, 64, 8), "bf16"),
    "huge": ((4096, 4096, 4096), tile(256, 256, 64, 4), "bf16"),
    "odd K": ((4096, 4096, 4095), tile(128, 128, 32, 8), "bf16"),
    "fp32": ((4096, 4096, 4096), tile(64, 64, 16, 8), "fp32"),
    "tf32": ((4096, 4096, 4096), tile(128, 128, 32, 8), "tf32"),
}
OTHERS = ["conv2d", "softmax", "softmax, online", "bias_relu"]


def compile_all(target: str, folder: pathlib.Path) -> None:
    """Write the machine code of every case, and the PTX of NVIDIA's, to `folder`."""
    import torch

    from tilelab import kernels
    from tilelab.kernels import _launch, _tiles
    from tilelab.perf.compiler import aot

    bf16 = torch.bfloat16

    def images(*shape):
        return torch.empty(shape, dtype=bf16, memory_format=torch.channels_last)

    calls = {
        "conv2d": lambda: kernels.conv2d(
            images(32, 128, 28, 28), images(256, 128, 3, 3), padding=1
        ),
        "softmax": lambda: kernels.softmax(torch.empty(4096, 1024, dtype=bf16)),
        "softmax, online": lambda: kernels.softmax(torch.empty(4096, 50257, dtype=bf16)),
        "bias_relu": lambda: kernels.bias_relu(images(64, 64, 28, 28), torch.empty(64, dtype=bf16)),
    }
    for name, ((m, n, k), _, dtype) in PRODUCTS.items():
        dtype = bf16 if dtype == "bf16" else torch.float32
        a, b = torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype)
        if name == "transposed B":
            b = torch.empty(n, k, dtype=dtype).t()
        calls[name] = lambda a=a, b=b: kernels.matmul(a, b)
    aot.compile_for(target)
    for name, call in calls.items():
        _, blocks, dtype = PRODUCTS.get(name, (None, None, "bf16"))
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        with contextlib.ExitStack() as stack:
            if blocks is not None:
                stack.enter_context(_tiles.use_tile("matmul", blocks))
            events = stack.enter_context(_launch.record())
            call()
        first = next(event for event in events if isinstance(event, _launch.Launch))
        asm = aot.compile_launch(first).asm
        if "cubin" in asm:
            (folder / name).write_bytes(asm["cubin"])
            (folder / f"{name}.ptx").write_text(asm["ptx"])
        else:
            (folder / name).write_text(asm["amdgcn"])


class Binaries:
    """What `compile_all` has written for one target, and its analyses."""

    def __init__(self, target: str, folder: pathlib.Path) -> None:
        self.target, self.folder = target, folder
        self.analyse = functools.cache(self.analyse)
        self.ptxas = functools.cache(self.ptxas)

    def cubin(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def analyse(self, name: str) -> dict:
        if self.target == "gfx942":
            return machine_code.analyse_amdgcn((self.folder / name).read_text())
        return machine_code.analyse_cubin(self.cubin(name))

    def ptxas(self, name: str) -> str:
        """What NVIDIA's assembler says of a kernel: the judge of spills and serialisation."""
        arch = self.target + ("a" if self.target != "sm_80" else "")
        options = ["-v", f"--gpu-name={arch}", f"{name}.ptx", "-o", os.devnull]
        for program in ["ptxas-blackwell", "ptxas"]:  # triton has an older and a newer one
            run = subprocess.run(
                [machine_code._tools() / program, *options],
                cwd=self.folder,
                capture_output=True,
                text=True,
            )
            if run.returncode == 0:
                return run.stderr + run.stdout
        raise AssertionError(run.stderr)


@pytest.fixture(scope="module", params=TARGETS)
def binaries(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = subprocess.run(
        [sys.executable, "-m", "tests.perf.test_machine_code", request.param, str(folder)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return Binaries(request.param, folder)


TENSOR_CORES = {
    "sm_80": {
        "default": "HMMA.16816.F32.BF16",
        "wide": "HMMA.16816.F32.BF16",
        "fp32": None,
        "tf32": "HMMA.1688.F32.TF32",
        "conv2d": "HMMA.16816.F32.BF16",
    },
    "sm_90": {
        "default": "HGMMA.64x128x16.F32.BF16",
        "wide": "HGMMA.64x256x16.F32.BF16",
        "fp32": None,
        "tf32": "HGMMA.64x128x8.F32.TF32",
        "conv2d": "HGMMA.64x128x16.F32.BF16",
    },
    "sm_100": {
        "default": "UTCHMMA",
        "wide": "UTCHMMA",
        "fp32": None,
        "tf32": "UTCHMMA",
        "conv2d": "UTCHMMA",
    },
    "gfx942": {
        "default": "v_mfma_f32_32x32x8_bf16",
        "wide": "v_mfma_f32_32x32x8_bf16",
        "fp32": "v_mfma_f32_32x32x2_f32",  # AMD's matrix cores multiply float32 in full
        "tf32": "v_mfma_f32_32x32x4_xf32",
        "conv2d": "v_mfma_f32_32x32x8_bf16",
    },
}
# How many warps execute one tensor-core instruction together, and its extents in M, N and K.
SHARED_BY = {
    "HMMA.16816.F32.BF16": (1, 16, 8, 16),
    "HMMA.1688.F32.TF32": (1, 16, 8, 8),
    "HGMMA.64x128x16.F32.BF16": (4, 64, 128, 16),
    "HGMMA.64x256x16.F32.BF16": (4, 64, 256, 16),
    "HGMMA.64x128x8.F32.TF32": (4, 64, 128, 8),
    "v_mfma_f32_32x32x8_bf16": (1, 32, 32, 8),
    "v_mfma_f32_32x32x4_xf32": (1, 32, 32, 4),
    "v_mfma_f32_32x32x2_f32": (1, 32, 32, 2),
}


@pytest.mark.slow
def test_tensor_cores(binaries):
    for name, expected in TENSOR_CORES[binaries.target].items():
        found = binaries.analyse(name)["tensor_core"]
        assert found == expected, name
    for name in OTHERS[1:]:
        found = binaries.analyse(name)
        assert found["tensor_core"] is None and found["tensor_cores_in_loop"] == 0, name


@pytest.mark.slow
def test_the_loop_does_the_work_of_one_step(binaries):
    for name, (_, blocks, _) in PRODUCTS.items():
        found = binaries.analyse(name)
        size, warps = (blocks[f"BLOCK_{x}"] for x in "MNK"), blocks["num_warps"]
        m, n, k = size
        count = found["tensor_cores_in_loop"]
        if found["tensor_core"] == "UTCHMMA":  # one thread issues it for the program: 128 rows
            step = 8 if name == "tf32" else 16
            assert count == (m // 128) * (k // step) * max(1, n // 256), name
        elif found["tensor_core"] is None:  # a multiply-add is an instruction of each warp
            loop = machine_code.annotate(binaries.cubin(name))
            fma = sum(("FFMA " in text) + 2 * ("FFMA2 " in text) for _, _, text in loop)
            assert fma * 32 * warps == m * n * k, name
        else:  # with more warps than 32 x 32 pieces, AMD's work twice
            together, tm, tn, tk = SHARED_BY[found["tensor_core"]]
            pieces = max((m // tm) * (n // tn), warps // together)
            assert count * (warps // together) == pieces * (k // tk), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "wide"])
def test_the_loop_loads_the_operands_of_one_step(binaries, name):
    found, blocks = binaries.analyse(name), PRODUCTS[name][1]
    threads = blocks["num_warps"] * (64 if binaries.target == "gfx942" else 32)
    elements = (blocks["BLOCK_M"] + blocks["BLOCK_N"]) * blocks["BLOCK_K"]
    assert found["load_bytes"] == 16
    assert found["loop_mix"]["load"] * threads * 16 == elements * 2


@pytest.mark.slow
def test_loops_and_counts(binaries):
    for name in [*PRODUCTS, *OTHERS]:
        found = binaries.analyse(name)
        if name in ("softmax", "bias_relu"):  # a row fits, a tile is one step: no loop
            assert found["loop_instructions"] is None and found["loop_mix"] == {}
            continue
        assert 0 < found["loop_instructions"] < found["instructions"], name
        assert sum(found["loop_mix"].values()) == found["loop_instructions"], name
        assert found["loop_mix"].get("tensor core", 0) == found["tensor_cores_in_loop"], name
        assert not found["tma"]
        wgmma = found["tensor_core"] and "G" in found["tensor_core"].split(".")[0]
        blackwell = found["tensor_core"] == "UTCHMMA"
        assert found["operands"] == ("shared" if wgmma or blackwell else None), name


@pytest.mark.slow
def test_narrow_loads(binaries):
    # A row of 4095 elements of 2 bytes starts anywhere, so no two of A can be loaded together.
    assert binaries.analyse("odd K")["load_bytes"] == 2
    # 50257 columns: the same. 1024 are loaded and stored 16 bytes at a time, or what a thread has.
    assert binaries.analyse("softmax, online")["load_bytes"] == 2
    assert binaries.analyse("softmax, online")["store_bytes"] == 2
    assert binaries.analyse("softmax")["load_bytes"] >= 8
    assert binaries.analyse("bias_relu")["store_bytes"] == 16


@pytest.mark.slow
def test_spills(binaries):
    for name in ["default", "wide", "tf32", "conv2d", "huge"]:
        found = binaries.analyse(name)
        spills = name == "huge"  # 256 x 256 accumulators are 512 a thread of 4 warps
        assert (found["spills"] > 0) == spills, name
        if binaries.target != "gfx942":
            says = re.search(r"(\d+) bytes spill stores", binaries.ptxas(name))
            assert (int(says[1]) > 0) == spills, name
            assert found["registers"] == 255 if spills else found["registers"] < 255
            used = re.search(r"Used (\d+) registers", binaries.ptxas(name))
            assert abs(found["registers"] - int(used[1])) <= 8  # triton has options of its own
    if binaries.target == "gfx942":
        assert binaries.analyse("huge")["registers"] == 512


@pytest.mark.slow
def test_serialised_wgmma_is_what_ptxas_warns_of(binaries):
    for name in ["default", "wide", "tf32", "conv2d", "huge", "transposed B"]:
        found = binaries.analyse(name)
        if binaries.target != "sm_90":
            assert not found["serialised"], name
            continue
        # The tile that spills is; a transposed B is with triton 3.6.0 and is not with 3.9.0.
        assert found["serialised"] == ("are serialized" in binaries.ptxas(name)), name
        if name != "transposed B":
            assert found["serialised"] == (name == "huge"), name


@pytest.mark.slow
def test_annotate(binaries):
    if binaries.target == "gfx942":
        with pytest.raises(PerfError):
            machine_code.annotate(binaries.cubin("wide"))
        return
    lines = (ROOT / "kernels" / "matmul.py").read_text().splitlines()
    dot = 1 + next(i for i, line in enumerate(lines) if "tl.dot(" in line)
    loop = machine_code.annotate(binaries.cubin("wide"))
    found = binaries.analyse("wide")
    assert len(loop) == found["loop_instructions"]
    # Of this checkout or of another: Triton's cache goes by the text of a kernel, not by its place.
    assert {pathlib.Path(file).name for file, _, _ in loop} == {"matmul.py"}
    tensor = [line for _, line, text in loop if found["tensor_core"] in text]
    assert len(tensor) == found["tensor_cores_in_loop"]
    assert tensor.count(dot) >= len(tensor) / 2  # triton 3.6.0 gives some to the line above
    assert any(re.search(r"@!?P\d BRA", text) for _, _, text in loop)  # predicates are shown
    # Without a loop it is all of the kernel.
    everything = machine_code.annotate(binaries.cubin("bias_relu"))
    assert len(everything) == binaries.analyse("bias_relu")["instructions"]


# -------------------------------------------------------------------------------------------------
# The parts, on short listings. The instructions are from code that triton 3.6.0 and 3.9.0 made.
# -------------------------------------------------------------------------------------------------


def listing(text: str) -> machine_code.Code:
    """Code of bare instructions and labels, as nvdisasm would print them."""
    lines = []
    for i, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        lines.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;")
    return machine_code.parse_sass("\n".join(lines))


def loop_of(text: str) -> list[str] | None:
    code = listing(text)
    loop = machine_code.main_loop(code)
    return None if loop is None else [str(code.instructions[i]) for i in loop]


# Blackwell: the wait for a barrier stands behind EXIT and jumps back into the loop.
WAITING = """
        MOV R1, RZ
        .L_loop:
        LDGSTS.E.128 [R1], desc[UR4][R2.64]
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR20], idesc[UR21], UPT
        SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R3
        @!P4 BRA `(.L_wait)
        .L_back:
        IADD3 R1, R1, 0x1, RZ
        @P0 BRA `(.L_loop)
        STG.E.128 desc[UR4][R2.64], R4
        EXIT
        .L_wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R3
        @!P4 BRA `(.L_wait)
        BRA `(.L_back)
        .L_trap:
        BRA `(.L_trap)
"""


def test_a_jump_back_alone_makes_no_loop():
    # Of four jumps back one returns from the wait, and one is never reached.
    starts = sorted(min(loop) for loop in machine_code.find_loops(listing(WAITING)))
    assert starts == [1, 9]


def test_waiting_code_behind_the_end_belongs_to_its_loop():
    assert loop_of(WAITING) == [
        "LDGSTS.E.128 [R1], desc[UR4][R2.64]",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR20], idesc[UR21], UPT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R3",
        "@!P4 BRA `(.L_wait)",
        "IADD3 R1, R1, 0x1, RZ",
        "@P0 BRA `(.L_loop)",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R3",
        "@!P4 BRA `(.L_wait)",
        "BRA `(.L_back)",
    ]


def test_a_loop_that_only_waits_is_not_the_main_loop():
    assert (
        loop_of("""
        .L_0:
        UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR4
        BRA.U !UP0, `(.L_0)
        EXIT
    """)
        is None
    )


def test_the_innermost_loop_with_tensor_cores():
    # Persistent kernels loop over tiles around the loop over k; the long loop in front has none.
    assert loop_of("""
        .L_long:
        FADD R1, R1, R2
        FADD R1, R1, R2
        FADD R1, R1, R2
        FADD R1, R1, R2
        @P0 BRA `(.L_long)
        .L_tiles:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        .L_k:
        HMMA.1688.F32.TF32 R4, R8, R12, R4
        BRA.U UP0, `(.L_k)
        STG.E desc[UR4][R2.64], R4
        @P1 BRA `(.L_tiles)
        EXIT
    """) == ["HMMA.1688.F32.TF32 R4, R8, R12, R4", "BRA.U UP0, `(.L_k)"]


def test_a_loop_inside_the_loop_with_tensor_cores():
    # Such as one over the taps of a filter whose addresses are loaded: it is part of the step.
    assert len(loop_of("""
        .L_k:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        .L_taps:
        LDG.E R1, desc[UR4][R2.64]
        @P0 BRA `(.L_taps)
        @P1 BRA `(.L_k)
        EXIT
    """)) == 4  # fmt: skip


@pytest.mark.parametrize(
    "branch", ["@P0 BRA `(.L_end)", "BRA.U UP0, `(.L_end)", "@!P0 EXIT", "CALL.REL.NOINC `($_f)"]
)
def test_what_may_be_passed_is_passed(branch):
    assert loop_of(f"""
        {branch}
        .L_0:
        FADD R1, R1, R2
        @P0 BRA `(.L_0)
        .L_end:
        EXIT
    """) == ["FADD R1, R1, R2", "@P0 BRA `(.L_0)"]


@pytest.mark.parametrize("branch", ["BRA `(.L_end)", "EXIT", "RET.REL.NODEC R4 `(kernel)"])
def test_what_cannot_be_reached_is_no_loop(branch):
    assert (
        loop_of(f"{branch} \n .L_0: \n FADD R1, R1, R2 \n @P0 BRA `(.L_0) \n .L_end: \n EXIT")
        is None
    )


def test_without_tensor_cores_the_longest_innermost_loop():
    body = ["LDG.E.U16 R1, desc[UR4][R2.64]", "FADD R1, R1, R2", "@P0 BRA `(.L_1)"]
    assert body == loop_of("""
        .L_outer:
        .L_0:
        LDG.E R1, desc[UR4][R2.64]
        @P0 BRA `(.L_0)
        .L_1:
        LDG.E.U16 R1, desc[UR4][R2.64]
        FADD R1, R1, R2
        @P0 BRA `(.L_1)
        MUFU.RCP R1, R1
        @P0 EXIT
        BRA `(.L_outer)
    """)


def test_code_without_a_loop():
    code = listing("LDG.E.64 R2, desc[UR4][R2.64] \n STG.E.64 desc[UR4][R4.64], R2 \n EXIT")
    found = machine_code._analyse(code)
    assert found["loop_instructions"] is None
    assert (found["load_bytes"], found["store_bytes"]) == (8, 8)
    assert found["instructions"] == 3


def test_what_is_inlined_from_triton_is_shown_at_the_line_that_called_it():
    standard, softmax = "/lib/triton/language/standard.py", "/tilelab/kernels/softmax.py"
    code = machine_code.parse_sass(f"""
        /*0000*/                   S2R R3, SR_CTAID.X ;
\t//## File "{standard}", line 196 inlined at "{standard}", line 216
\t//## File "{standard}", line 216 inlined at "{softmax}", line 127
\t//## File "{softmax}", line 127
        /*0010*/                   FMNMX R8, R12, R9, !PT ;
        /*0020*/              @!P5 STS [R21], R35 ;
\t//## File "/tilelab/kernels/_rows.py", line 32 inlined at "{softmax}", line 115
\t//## File "{softmax}", line 115
        /*0030*/                   IABS R3, R3 ;
\t//## File "{standard}", line 170
        /*0040*/                   FMNMX R9, R8, R9, !PT ;
    """)
    assert [x.source for x in code.instructions] == [
        ("", 0),
        (softmax, 127),
        (softmax, 127),
        ("/tilelab/kernels/_rows.py", 32),
        (standard, 170),  # triton 3.6.0 does not say who called
    ]


def wgmma_loop(body: str) -> dict:
    return machine_code._analyse(listing(f".L_0: \n {body} \n @P0 BRA `(.L_0) \n EXIT"))


def test_serialised_as_triton_3_6_compiles_a_transposed_b():
    # 128 x 256 x 64, 8 warps. The first is bf16 with B row-major, the second with B transposed.
    healthy = wgmma_loop("""
        WARPGROUP.ARRIVE
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20].tnspB, R24
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
    """)
    serialised = wgmma_loop("""
        WARPGROUP.ARRIVE
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        WARPGROUP.ARRIVE
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        WARPGROUP.ARRIVE
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        WARPGROUP.ARRIVE
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
    """)
    assert not healthy["serialised"] and serialised["serialised"]
    assert healthy["tensor_cores_in_loop"] == serialised["tensor_cores_in_loop"] == 4
    assert healthy["operands"] == serialised["operands"] == "shared"


@pytest.mark.parametrize(
    ("instruction", "operands"),
    [
        ("HGMMA.64x128x16.F32.BF16 R88, gdesc[UR16].tnspB, R88", "shared"),
        ("HGMMA.64x128x16.F32.BF16 R88, R168, gdesc[UR16].tnspB, R88", "registers"),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR20], idesc[UR21], UPT", "shared"),
        ("UTCHMMA tmem[UR7], gdesc[UR14], tmem[UR11], tmem[UR26], idesc[UR27]", "tensor memory"),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", None),
        ("HFMA2.MMA R4, -RZ, RZ, 0, 0", None),
    ],
)
def test_where_a_comes_from(instruction, operands):
    assert wgmma_loop(f"LDS R1, [R2] \n {instruction}")["operands"] == operands


def test_tma():
    found = wgmma_loop("UTMALDG.2D [UR8], [UR4] \n HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24")
    assert found["tma"] and found["load_bytes"] == 16
    assert machine_code._analyse(listing("UTMASTG.2D [UR8], [UR4] \n EXIT"))["store_bytes"] == 16


def test_loads_are_of_the_loop_and_else_of_the_kernel():
    epilogue = "LDG.E.U16 R1, desc[UR4][R2.64] \n EXIT"
    in_loop = f".L_0: \n LDG.E.128 R1, desc[UR4][R2.64] \n @P0 BRA `(.L_0) \n {epilogue}"
    assert machine_code._analyse(listing(in_loop))["load_bytes"] == 16
    elsewhere = f".L_0: \n FADD R1, R1, R2 \n @P0 BRA `(.L_0) \n {epilogue}"
    assert machine_code._analyse(listing(elsewhere))["load_bytes"] == 2


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("LDG.E", 4),
        ("LDG.E.U8", 1),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.64", 8),
        ("LDG.E.EL.128", 16),
        ("LDGSTS.E", 4),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDGSTS.E.LTC128B", 4),  # the L2 prefetches 128 bytes; the thread loads 4
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("UTMALDG.2D", 16),
        ("STG.E.U16", 2),
        ("buffer_load_dwordx4", 16),
        ("buffer_load_dwordx3", 12),
        ("buffer_load_dword", 4),
        ("buffer_load_ushort", 2),
        ("buffer_load_short_d16_hi", 2),
        ("global_load_ubyte", 1),
        ("buffer_store_short", 2),
        ("global_store_dwordx2", 8),
    ],
)
def test_widths(name, width):
    assert machine_code._width(Instruction(name)) == width


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("HGMMA.64x256x16.F32.BF16", "tensor core"),
        ("HMMA.16816.F32.BF16", "tensor core"),
        ("IMMA.16832.S8.S8", "tensor core"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "tensor core"),
        ("UTCHMMA", "tensor core"),
        ("UTCQMMA", "tensor core"),
        ("HFMA2.MMA", "float"),  # not a tensor core, whatever it is called
        ("FFMA", "float"),
        ("FMNMX", "float"),
        ("MUFU.EX2", "float"),
        ("F2FP.BF16.F32.PACK_AB", "float"),
        ("LDG.E.128", "load"),
        ("LDGSTS.E.BYPASS.128", "load"),
        ("UTMALDG.2D", "load"),
        ("LDS.128", "shared memory"),
        ("LDSM.16.MT88.4", "shared memory"),
        ("LDTM.x64", "shared memory"),
        ("IMAD.MOV.U32", "integer"),
        ("ULEA.HI", "integer"),
        ("R2UR", "integer"),
        ("F2I.FTZ.U32.TRUNC.NTZ", "integer"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("WARPGROUP.ARRIVE", "control"),
        ("LDGDEPBAR", "control"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "control"),
        ("STG.E.128", "other"),
        ("LDL.64", "other"),
        ("LDC.64", "other"),
        ("v_mfma_f32_32x32x8_bf16", "tensor core"),
        ("v_smfmac_f32_32x32x16_bf16", "tensor core"),
        ("v_pk_fma_f32", "float"),
        ("v_exp_f32_e32", "float"),
        ("v_mov_b32_e32", "integer"),
        ("s_add_u32", "integer"),
        ("ds_read_b128", "shared memory"),
        ("buffer_load_dwordx4", "load"),
        ("s_load_dwordx4", "other"),
        ("scratch_load_dword", "other"),
        ("s_waitcnt", "control"),
        ("s_cbranch_scc1", "control"),
    ],
)
def test_groups(name, group):
    assert machine_code._group(Instruction(name)) == group


def test_fillers_that_never_run_are_no_loads():
    assert machine_code._group(listing("@!PT LDS RZ, [RZ]").instructions[0]) == "other"


def test_the_widest_instruction():
    names = ["HMMA.1688.F32.TF32", "HMMA.16816.F32.BF16", "HGMMA.64x8x16.F32.BF16"]
    names += ["HGMMA.64x256x16.F32.BF16", "v_mfma_f32_16x16x16_bf16", "v_mfma_f32_32x32x8_bf16"]
    work = [machine_code._flops(Instruction(name)) for name in names]
    assert work[0] < work[1] and work[2] < work[3] and work[4] < work[5]


def test_amd_assembly():
    found = machine_code.analyse_amdgcn("\n".join([
        "matmul_kernel:                          ; @matmul_kernel",
        "\t.loc\t1 80 0 prologue_end             ; matmul.py:80:0",
        "\ts_load_dwordx2 s[2:3], s[0:1], 0x0",
        ".LBB0_17:                               ; =>This Inner Loop Header: Depth=1",
        "\tbuffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen",
        "\tds_read_b64 v[6:7], v8",
        "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[6:7], a[0:15]",
        "\ts_cbranch_scc1 .LBB0_17",
        "; %bb.18:",
        "\tbuffer_store_dwordx2 v[2:3], v1, s[4:7], 0 offen",
        "\ts_endpgm",
        "  - .agpr_count:     16",
        "    .sgpr_spill_count: 7",
        "    .vgpr_count:     168",
        "    .vgpr_spill_count: 3",
    ]))  # fmt: skip
    assert found == {
        "registers": 168,
        "spills": 12,
        "tensor_core": "v_mfma_f32_32x32x8_bf16",
        "tensor_cores_in_loop": 1,
        "operands": None,
        "serialised": False,
        "load_bytes": 16,
        "store_bytes": 8,
        "tma": False,
        "loop_instructions": 4,
        "instructions": 7,
        "loop_mix": {"load": 1, "shared memory": 1, "tensor core": 1, "control": 1},
    }


# -------------------------------------------------------------------------------------------------
# What goes wrong, in one line.
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [machine_code.analyse_cubin, machine_code.annotate])
@pytest.mark.parametrize(
    ("cubin", "message"),
    [(b"", "cannot read"), (b"junk", "cannot read this cubin"), (b"\x7fELF...", "cannot read")],
)
def test_not_a_cubin(function, cubin, message):
    with pytest.raises(PerfError, match=message) as error:
        function(cubin)
    assert "\n" not in str(error.value) and "/tmp" not in str(error.value)


def test_a_tool_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "_tools", lambda: tmp_path)
    with pytest.raises(PerfError, match="cannot run cuobjdump, which ships inside triton"):
        machine_code.analyse_cubin(b"cubin")
    with pytest.raises(PerfError, match="cannot run nvdisasm"):
        machine_code.annotate(b"cubin")


if __name__ == "__main__":
    compile_all(sys.argv[1], pathlib.Path(sys.argv[2]))

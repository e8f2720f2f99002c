import pytest

from tests.tools import ptx_programs
from tilelab.perf.machine import ptx
from tilelab.perf.machine.errors import UnknownInstruction

KERNEL = """
.version 8.4
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .align 64 .b8 kernel_param_0[128],
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 128
.maxnreg 168
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<2>;
	.loc	1 12 0                         // k.py:12:0
$L__func_begin0:
	ld.param.b64 	%rd1, [kernel_param_2];
$L__tmp0:
	.loc	2 43 13, function_name $L__info_string0, inlined_at 1 30 16 // s.py:43:13
	mov.b32 	%r1, 0f3F800000;
	@!%p1 bra 	$L__BB0_1;
	// begin inline asm
	.loc	1 99 9
	{
	.reg .pred done;
	wait:
	mbarrier.try_wait.parity.shared::cta.b64 done, [%r1 + -8], %r2;
	@!done bra.uni wait;
	}
	// end inline asm
	.loc	1 13 4                          // k.py:13:4 @[ caller.py:7:2 ]
	ld.global.v2.b32 { %r1, %r2 },
		[ %rd1 + 16 ];
	{
	.reg .pred done;
	elect.sync %r3|done, -1;
	@done cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r2];
	}
$L__BB0_1:
	ret;
}
	.file	1 "/src/k.py"
	.file	2 "/lib/s.py"
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return ptx.parse(KERNEL)


def test_what_stands_around_the_code(program):
    assert program.name == "kernel" and program.threads == 128 and program.max_registers == 168
    assert [(p.type, p.offset, p.size) for p in program.parameters] == [
        ("b8", 0, 128), ("u32", 128, 4), ("u64", 136, 8),
    ]  # fmt: skip
    assert program.registers["%rd1"] == "b64" and program.registers["%p2"] == "pred"


def test_operands(program):
    flat = [inst for block in program.blocks for inst in block]
    load, move, branch, wait, again, vector, elect, tma, end = flat
    assert load.operands[1] == ptx.Address(ptx.Symbol("kernel_param_2"), 0)
    assert move.operands[1] == ptx.Immediate(0x3F800000, 4)
    assert branch.guard == ("%p1", True) and branch.operands == (ptx.Symbol("$L__BB0_1"),)
    assert wait.operands[1] == ptx.Address(ptx.Register("%r1"), -8)
    assert vector.operands[0] == ptx.Vector((ptx.Register("%r1"), ptx.Register("%r2")))
    assert vector.text == "ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ]"  # of two lines
    assert elect.operands[0].first == ptx.Register("%r3")
    assert tma.operands[1] == ptx.TensorAddress(
        ptx.Register("%rd1"), (ptx.Register("%r2"), ptx.Register("%r3"))
    )
    # Two scopes have a `done` each.
    assert again.guard[0] != tma.guard[0] == elect.operands[0].second.name
    assert {program.registers[again.guard[0]], program.registers[tma.guard[0]]} == {"pred"}
    assert end.op == "ret"


def test_blocks_end_where_threads_may_part(program):
    assert [len(block) for block in program.blocks] == [3, 1, 1, 3, 1, 0]
    assert program.labels["$L__BB0_1"] == 4 and "$L__tmp0" not in program.labels
    loop = program.blocks[2][0].operands[0].name
    assert program.labels[loop] == 1


def test_where_code_comes_from(program):
    flat = [inst for block in program.blocks for inst in block]
    assert flat[0].source == (("/src/k.py", 12),)
    assert flat[1].source == (("/lib/s.py", 43), ("/src/k.py", 30))
    assert flat[3].source == flat[1].source  # lines of inline assembly are not the source's
    assert flat[5].source == (("/src/k.py", 13), ("caller.py", 7))  # as triton 3.6.0 has it
    assert KERNEL.splitlines()[flat[1].line - 1].split() == ["mov.b32", "%r1,", "0f3F800000;"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("no .entry", ".version 8.4"),
        ("calls a function", KERNEL.replace("ret;", "call f;\n\tret;")),
        ("clusters", KERNEL.replace(".reqntid 128", ".reqntid 128\n.explicitcluster")),
        ("cannot read", KERNEL.replace("ret;", "42;")),
    ],
)
def test_what_cannot_be_read_is_named(words, text):
    with pytest.raises(UnknownInstruction, match=words):
        ptx.parse(text)


def test_an_unknown_instruction_is_named_with_its_line():
    with pytest.raises(UnknownInstruction, match=r"frobnicate\.b32.*PTX line 2\d: frobnicate"):
        ptx_programs.run("frobnicate.b32 %r2, %r0;")

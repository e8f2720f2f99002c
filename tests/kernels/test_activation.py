"""activation.py: every activation, forward and gradient, in every kernel that ends with one."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from tests.tools.inputs import DEVICE, DTYPES, INTERPRET, LAYOUTS, double, gradients, randn
from tests.tools.poison import poison
from tests.tools.tolerance import assert_close, bound, compare
from tilelab import kernels
from tilelab.kernels import _launch, bias_activation, conv2d, conv2d_im2col, matmul, scaled_matmul
from tilelab.kernels._launch import Device
from tilelab.kernels._tiles import use_tile
from tilelab.kernels.activation import ACTIVATIONS, activated
from tilelab.kernels.bias_relu import reference as bias_reference
from tilelab.kernels.conv2d import reference as conv2d_reference
from tilelab.kernels.matmul import reference as matmul_reference
from tilelab.nets.layers import Linear

ROOT = pathlib.Path(kernels.__file__).parents[1]
NEW = [name for name in ACTIVATIONS if name != "relu"]  # ReLU's own tests are every operator's


# --- the formulas ---------------------------------------------------------------------------------


def of_numbers(name, z):
    """(y, dy/dz) of one column of numbers, in float32: no bias, and a dy of ones."""
    y, (dz,) = gradients(lambda x: bias_activation(x, None, name), [z], torch.ones_like(z))
    return y.double(), dz.double()


def of_torch(name, z):
    """The same in float64."""
    z = z.double().requires_grad_()
    y = activated(z, name)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


@pytest.mark.core
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_formulas_to_float32(name):
    """Within 4e-7 of 1 or of |z|, on all of where an activation bends."""
    z = torch.linspace(-12, 12, 3001, device=DEVICE)[:, None]
    for got, want in zip(of_numbers(name, z), of_torch(name, z), strict=True):
        assert ((got - want).abs() <= 4e-7 * z.abs().clamp(1)).all()


@pytest.mark.core
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_numbers_at_the_ends(name):
    """NaN, infinities and what overflows on the way are what torch has in float64."""
    ends = [torch.nan, torch.inf, -torch.inf, 0.0, 1e-30, -1e-30, 88.0, -88.0, 1e9, -1e9, 3e38]
    z = torch.tensor(ends, device=DEVICE)[:, None]
    y, dz = of_numbers(name, z)
    y64, dz64 = of_torch(name, z)
    torch.testing.assert_close(y, y64, rtol=1e-6, atol=1e-30, equal_nan=True)
    finite = slice(0, -1) if name == "gelu_tanh" else slice(None)  # its slope overflows, as torch's
    torch.testing.assert_close(dz[finite], dz64[finite], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NEW)
def test_the_gradient_of_relu_would_fail(name, dtype):
    """And so would that of each other activation, in every dtype: the bounds below have teeth."""
    z = randn(64, 32)
    _, right = of_torch(name, z)
    for other in set(ACTIVATIONS) - {name, *({"gelu", "gelu_tanh"} if "gelu" in name else ())}:
        _, wrong = of_torch(other, z)
        assert compare(wrong.to(dtype), right, bound(dtype, 40, roundings=3)) is not None


# --- every kernel that ends with an activation ----------------------------------------------------

small = dict(num_warps=4, num_stages=2)
TMA = dict(
    kernel="tma", BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, SUBTILES=2, PROGRAMS_PER_SM=1
) | small  # fmt: skip
BOX = dict(kernel="tma", BLOCK_M=128, BLOCK_N=64, BLOCK_K=16, PROGRAMS_PER_SM=1) | small
PRODUCT = (matmul, matmul_reference, [(40, 48), (48, 40), (40,)], {})
CONV = (conv2d, conv2d_reference, [(2, 24, 6, 7), (16, 24, 3, 3), (16,)], dict(padding=1))
FEW = (conv2d, conv2d_reference, [(2, 3, 7, 6), (5, 3, 2, 3), (5,)], dict(stride=2))
# (op, reference, sizes of its inputs, options), the name and the tile that are forced
CASES = {
    "matmul": (PRODUCT, None, None),
    "matmul by TMA": (PRODUCT, "matmul", TMA | dict(SPLIT_K=1)),
    "matmul by TMA in parts": (PRODUCT, "matmul", TMA | dict(SPLIT_K=3)),
    "conv2d": (CONV, None, None),
    "conv2d by TMA": (CONV, "conv2d", BOX | dict(SPLIT_K=1)),
    "conv2d by TMA in parts": (CONV, "conv2d", BOX | dict(SPLIT_K=2)),
    "conv2d, direct": (CONV, "conv2d", dict(kernel="direct", BLOCK_M=128, BLOCK_N=16) | small),
    "conv2d, few channels": (FEW, None, None),
    "conv2d of one pixel": (
        (conv2d, conv2d_reference, [(2, 24, 4, 5), (16, 24, 1, 1), (16,)], {}), None, None
    ),
    "conv2d in groups": (
        (conv2d, conv2d_reference, [(2, 32, 5, 4), (32, 16, 3, 3), (32,)], dict(groups=2)),
        None, None,
    ),
    "conv2d, depthwise": (
        (conv2d, conv2d_reference, [(2, 8, 6, 5), (8, 1, 3, 3), (8,)], dict(groups=8)), None, None
    ),
    "conv2d_im2col": ((conv2d_im2col, *FEW[1:]), None, None),
    "bias_activation": ((bias_activation, bias_reference, [(3, 10, 4, 5), (10,)], {}), None, None),
}  # fmt: skip


def inputs_of(sizes, dtype):
    """Of a variance of about 1 in the product; images are channels_last."""
    x, *rest = sizes
    xs = [randn(*x, dtype=dtype, layout="channels_last" if len(x) == 4 else "contiguous")]
    for i, size in enumerate(rest):
        terms = torch.Size(size).numel() / size[0] if len(size) == 4 else size[0]
        scale = terms**0.5 if len(size) > 1 else 1
        layout = "channels_last" if len(size) == 4 else "contiguous"
        xs.append(randn(*size, dtype=dtype, layout=layout, seed=1 + i) / scale)
    return xs


def takes(case, dtype):
    """float32 by TMA is of TF32; float16 differs from bfloat16 in its rounding alone."""
    by_tma = "TMA" in case
    return not by_tma if dtype == torch.float32 else by_tma or dtype == torch.bfloat16


@pytest.mark.core
@pytest.mark.parametrize(
    "case, dtype", [(case, dtype) for case in CASES for dtype in DTYPES if takes(case, dtype)]
)
@pytest.mark.parametrize("name", NEW)
def test_forward_and_gradients(name, case, dtype):
    (op, reference, sizes, options), tile_of, tile = CASES[case]
    inputs, options = inputs_of(sizes, dtype), options | dict(activation=name)
    forced = use_tile(tile_of, tile) if tile else contextlib.nullcontext()
    with forced, torch.no_grad():  # fused: rounded once
        fused = op(*inputs, **options)
    want = reference(*double(*inputs), **options)
    dy = randn(*want.shape, dtype=dtype, seed=9)
    with use_tile(tile_of, tile) if tile else contextlib.nullcontext():
        y, grads = gradients(lambda *xs: op(*xs, **options), inputs, dy)
    want, want_grads = gradients(lambda *xs: reference(*xs, **options), double(*inputs), double(dy))
    terms = max(64, torch.Size(sizes[1]).numel())
    assert_close(fused, want, dtype=dtype, terms=terms, name="y, fused")
    assert_close(y, want, dtype=dtype, terms=terms, roundings=2, name="y")
    assert y.stride() == fused.stride()
    for what, got, right in zip(("dx", "dw", "db"), grads, want_grads, strict=False):
        assert_close(got, right, dtype=dtype, terms=4 * terms, roundings=3, name=what)


@pytest.mark.parametrize("name", NEW)
def test_scaled_matmul(name):
    a, b = (
        torch.randint(-9, 9, (20, 32), generator=torch.Generator().manual_seed(i), dtype=torch.int8)
        for i in range(2)
    )
    a, b, scale = a.to(DEVICE), b.to(DEVICE).t(), torch.tensor(0.01, device=DEVICE)
    bias = randn(20)
    c = scaled_matmul(a, b, scale, scale, bias, name, torch.float32)
    want = activated(a.double() @ b.double() * scale.double() ** 2 + bias.double(), name)
    assert_close(c, want, dtype=torch.float32, terms=32)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("op", ["matmul", "conv2d"])
def test_with_gradients_float32_has_the_same_bits(op, name):
    """z is rounded to the dtype, which is that of the sum."""
    op, _, sizes, options = PRODUCT if op == "matmul" else CONV
    inputs, options = inputs_of(sizes, torch.float32), options | dict(activation=name)
    fused = op(*inputs, **options)
    y, _ = gradients(lambda *xs: op(*xs, **options), inputs, fused)
    assert torch.equal(y, fused) and y.stride() == fused.stride()


# --- what is launched and kept --------------------------------------------------------------------


def launched(fn, *inputs):
    with _launch.record(Device(80, sms=108)) as events:
        fn(*inputs)
    return [e.kernel.__name__ for e in events if isinstance(e, _launch.Launch)]


@pytest.mark.skipif(not INTERPRET, reason="records on CPU tensors")
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_it_is_fused_unless_a_gradient_needs_z(name, wanted):
    inputs = inputs_of(CONV[2], torch.bfloat16)
    for i in wanted:
        inputs[i].requires_grad_()
    apart = ["bias_activation_kernel"] if wanted and name != "relu" else []

    def call(*xs):
        return conv2d(*xs, **CONV[3], activation=name)

    assert launched(call, *inputs) == ["conv2d_kernel", *apart]
    with torch.no_grad():
        assert launched(call, *inputs) == ["conv2d_kernel"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_only_the_gradients_that_are_wanted(name):
    for wanted in range(3):
        inputs = inputs_of(PRODUCT[2], torch.float32)
        inputs[wanted].requires_grad_()
        matmul(*inputs, name).sum().backward()
        assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def test_what_is_fused_refuses_to_give_a_wrong_gradient():
    a, b, bias = inputs_of(PRODUCT[2], torch.float32)
    with pytest.raises(RuntimeError, match="silu has no gradient where it is fused"):
        torch.ops.tilelab.matmul(a.requires_grad_(), b, bias, "silu")


# --- the pass of its own --------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(37, 19), (2, 19, 3, 5)])
def test_any_layout_and_nothing_out_of_bounds(shape, with_bias, layout):
    """x is what is kept, so its gaps are not those of dx."""
    x, dy = randn(*shape, layout=layout), randn(*shape, seed=2)
    bias = randn(19, layout="sliced", seed=1) if with_bias else None
    with poison() as p:
        inputs = [p(x)] + ([p(bias)] if with_bias else [])
        y, grads = gradients(lambda x, b=None: bias_activation(x, b, "gelu"), inputs, p(dy))
    inputs64 = double(x, bias)[: 1 + with_bias]
    want, want_grads = gradients(
        lambda x, b=None: bias_reference(x, b, "gelu"), inputs64, double(dy)
    )
    teeth = layout != "expanded"  # whose rows are equal
    assert_close(y, want, dtype=torch.float32, terms=4, teeth=teeth)
    for got, right in zip(grads, want_grads, strict=True):
        assert_close(got, right, dtype=torch.float32, terms=64)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4, 0, 3)])
def test_of_nothing(shape):
    inputs = [randn(*shape), randn(shape[1], seed=1)]
    y, (dx, db) = gradients(lambda *xs: bias_activation(*xs, "gelu"), inputs, randn(*shape))
    assert y.shape == dx.shape == shape and torch.equal(db, torch.zeros_like(db))


def test_an_unknown_activation_is_refused():
    x, w, b = inputs_of(CONV[2], torch.float32)
    message = "activation must be one of .*'relu', 'gelu', 'gelu_tanh', 'silu', got 'tanh'"
    for call in (
        lambda: matmul(x[0, 0], x[0, 0].t(), None, "tanh"),
        lambda: conv2d(x, w, b, activation="tanh"),
        lambda: conv2d_im2col(x, w, b, activation="tanh"),
        lambda: bias_activation(x, None, "tanh"),
        lambda: Linear(3, 4, activation="tanh"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="activation must be one of 'relu', .* got None"):
        bias_activation(x, None, None)


# --- a new one ------------------------------------------------------------------------------------

LINE = '    "softplus": Activation(torch.nn.functional.softplus),\n'
BRANCH = """    elif ACTIVATION == "softplus":
        out = tl.log(1 + tl.exp(z)) if dy is None else dy * tl.sigmoid(z)
"""
USE = """
import torch
from tilelab import kernels
from tilelab.kernels.activation import activated
from tilelab.nets.layers import Linear

torch.manual_seed(0)
image, filters = torch.randn(2, 6, 5, 5), torch.randn(4, 6, 3, 3) / 7
for op, *inputs in (
    (kernels.matmul, torch.randn(9, 20), torch.randn(20, 8) / 4, torch.randn(8)),
    (kernels.conv2d, image, filters, torch.randn(4)),
    (kernels.conv2d_im2col, image, filters, torch.randn(4)),
    (kernels.conv2d, image, torch.randn(6, 1, 3, 3), torch.randn(6), 1, 0, 1, 6),
    (kernels.bias_activation, image, torch.randn(6)),
):
    xs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    leaves = [x for x in xs if isinstance(x, torch.Tensor)]
    if op is kernels.bias_activation:
        want = activated(xs[0] + xs[1][:, None, None], "softplus")
    elif op is kernels.matmul:
        want = activated(xs[0] @ xs[1] + xs[2], "softplus")
    else:
        want = activated(torch.nn.functional.conv2d(*xs), "softplus")
    y = op(*xs, activation="softplus")
    with torch.no_grad():
        torch.testing.assert_close(op(*xs, activation="softplus"), want)
    torch.testing.assert_close(y, want)
    for got, right in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (y, want))):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
print(Linear(3, 4, activation="softplus")(torch.zeros(1, 3)).shape)
"""


@pytest.mark.skipif(not INTERPRET, reason="on CPU tensors")
def test_a_new_activation_is_a_line_and_a_branch_of_one_file(tmp_path):
    for folder in ("tilelab", "kernels", "nets"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    file = tmp_path / "kernels" / "activation.py"
    text = file.read_text()
    last, rest = '    "silu": Activation', "    else:\n        tl.static_assert"
    assert text.count(last) == text.count(rest) == 1
    file.write_text(text.replace(last, LINE + last).replace(rest, BRANCH + rest))
    run = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1"),
    )  # fmt: skip
    assert run.stderr == "" and run.stdout == "torch.Size([1, 4])\n"


def test_no_other_kernel_names_an_activation():
    """But for ReLU where an operator is made for it, and what a signature's docs say."""
    for path in (ROOT / "kernels").glob("*.py"):
        names = set(ACTIVATIONS)
        if path.stem.startswith(("bias_relu", "conv2d_input_grad", "conv2d_stack", "conv2d_relu")):
            names.remove("relu")
        lines = path.read_text().splitlines()
        named = [
            line for line in lines
            if any(f'"{name}"' in line for name in names)
            and ">>>" not in line and not line.strip().startswith("activation: ")
        ]  # fmt: skip
        assert bool(named) == (path.stem == "activation"), named

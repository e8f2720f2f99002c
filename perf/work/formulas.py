"""Inputs, and PyTorch's formulas, that are too long for an operator's row (operators.py)."""

import contextlib

import torch
import torch.nn.functional as F

from tilelab.perf.work import cost


class Maker:
    """Makes input tensors: random ones from a seed, or empty ones where `seed` is None."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int | None) -> None:
        self.dtype, self.device = dtype, device
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """A tensor of values in [-1, 1]; an image (four dimensions) is channels_last."""
        memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        x = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=memory)
        return x if self.generator is None else x.uniform_(-1, 1, generator=self.generator)

    def eight_bit(self, *shape: int) -> torch.Tensor:
        """Values over the whole range of an 8-bit dtype, as scales make operands have."""
        if self.generator is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        top = 127 if self.dtype == torch.int8 else 448
        x = torch.empty(shape, device=self.device).uniform_(-top, top, generator=self.generator)
        return x.to(self.dtype)

    def scale(self) -> torch.Tensor:
        """A scale in [0.001, 0.002], float32 []."""
        x = torch.empty((), device=self.device)
        return x if self.generator is None else x.uniform_(0.001, 0.002, generator=self.generator)

    def classes(self, rows: int, classes: int) -> torch.Tensor:
        """Class indices, int64 [rows]."""
        if self.generator is None:
            return torch.zeros(rows, dtype=torch.int64, device=self.device)
        return torch.randint(classes, (rows,), device=self.device, generator=self.generator)


def conv_inputs(s, make):
    """An image, and filters."""
    return dict(
        x=make(s["N"], s["C"], s["H"], s["W"]),
        weight=make(s["K"], s["C"] // s["groups"], s["R"], s["S"]),
    )


def fused_inputs(s, make):
    """An image, filters and their bias."""
    return conv_inputs(s, make) | dict(bias=make(s["K"]))


def geometry(s):
    """What a convolution is given behind its tensors."""
    return s["stride"], s["padding"], s["dilation"], s["groups"]


def columns(x, s):
    """unfold, with the columns in our order: [N*P*Q, (group, r, s, channel)]."""
    taps, C = s["R"] * s["S"], s["C"] // s["groups"]
    columns = F.unfold(x, (s["R"], s["S"]), s["dilation"], s["padding"], s["stride"])
    columns = columns.view(len(x), s["groups"], C, taps, -1).permute(0, 4, 1, 3, 2)
    return columns.reshape(-1, s["C"] * taps)


def fold(columns, s):
    """fold, of columns in our order."""
    taps, C = s["R"] * s["S"], s["C"] // s["groups"]
    columns = columns.view(s["N"], -1, s["groups"], taps, C).permute(0, 2, 4, 3, 1)
    return F.fold(
        columns.reshape(s["N"], s["C"] * taps, -1), (s["H"], s["W"]), (s["R"], s["S"]),
        s["dilation"], s["padding"], s["stride"],
    )  # fmt: skip


def col2im_inputs(s, make):
    """The columns of an image."""
    P, Q = cost.output_size(s)
    return dict(columns=make(s["N"] * P * Q, s["C"] * s["R"] * s["S"]))


def scaled_inputs(s, make):
    """B is the transpose of a row-major [N, K], as weights are; one scale a tensor."""
    a, b = make.eight_bit(s["M"], s["K"]), make.eight_bit(s["N"], s["K"]).t()
    return dict(a=a, b=b, scale_a=make.scale(), scale_b=make.scale())


def scaled_mm(s, a, b, scale_a, scale_b):
    """With scales of whole tensors, cuBLASLt's fastest; of int8 it has none, and nor has torch."""
    if scale_a.dtype == torch.float64:  # the reference
        return (a.double() @ b.double()) * scale_a * scale_b
    if a.dtype == torch.int8:
        return (torch._int_mm(a, b) * (scale_a * scale_b)).bfloat16()
    fast = a.is_cuda  # sums as our kernel has them
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


def conv_bias_relu(s, x, weight, bias):
    """All in cuDNN's own epilogue where nobody follows: no other peer is as fast in 16 bits."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and not _traced():
        stride, padding, dilation = ((s[k], s[k]) for k in ("stride", "padding", "dilation"))
        with contextlib.suppress(RuntimeError):  # if no engine of cuDNN has this one
            return torch.cudnn_convolution_relu(
                x, weight, bias, stride, padding, dilation, s["groups"]
            )
    return F.relu(F.conv2d(x, weight, bias, *geometry(s)))


def _traced():
    """Whether somebody follows what is computed: autograd, or torch.compile."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()

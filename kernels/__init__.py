"""GPU operators in pure Python, one lesson a file. Start with kernels/README.md."""

import kernels._launch  # noqa: F401  first: it picks GPU or interpreter, before triton is imported
from kernels.bias_relu import bias_relu
from kernels.conv2d import conv2d
from kernels.conv2d_relu_pool import conv2d_relu_pool
from kernels.im2col import col2im, conv2d_im2col, im2col
from kernels.matmul import matmul

__all__ = [
    "bias_relu",
    "col2im",
    "conv2d",
    "conv2d_im2col",
    "conv2d_relu_pool",
    "im2col",
    "matmul",
]

"""GPU operators in pure Python, one lesson a file. Start with kernels/README.md."""

import kernels._launch  # noqa: F401  first: it picks GPU or interpreter, before triton is imported
from kernels.bias_relu import bias_relu
from kernels.conv2d import conv2d
from kernels.conv2d_relu_pool import conv2d_relu_pool
from kernels.conv2d_stack import conv2d_stack
from kernels.cross_entropy import cross_entropy
from kernels.im2col import col2im, conv2d_im2col, im2col
from kernels.matmul import matmul
from kernels.optim import SGD, AdamW
from kernels.pool import max_pool2d
from kernels.scaled_matmul import scaled_matmul
from kernels.softmax import softmax

__all__ = [
    "SGD",
    "AdamW",
    "bias_relu",
    "col2im",
    "conv2d",
    "conv2d_im2col",
    "conv2d_relu_pool",
    "conv2d_stack",
    "cross_entropy",
    "im2col",
    "matmul",
    "max_pool2d",
    "scaled_matmul",
    "softmax",
]

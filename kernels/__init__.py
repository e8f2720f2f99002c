"""GPU operators in pure Python, one lesson a file. Start with kernels/README.md."""

if __name__ != "tilelab.kernels":
    raise ImportError(f"this folder is the package tilelab.kernels: import that, not {__name__}")

from tilelab.kernels import _launch  # noqa: F401  first: it picks GPU or interpreter
from tilelab.kernels.bias_relu import bias_activation, bias_relu
from tilelab.kernels.conv2d import conv2d
from tilelab.kernels.conv2d_relu_pool import conv2d_relu_pool
from tilelab.kernels.conv2d_stack import conv2d_stack
from tilelab.kernels.cross_entropy import cross_entropy
from tilelab.kernels.im2col import col2im, conv2d_im2col, im2col
from tilelab.kernels.matmul import matmul
from tilelab.kernels.optim import SGD, AdamW
from tilelab.kernels.pool import max_pool2d
from tilelab.kernels.scaled_matmul import scaled_matmul
from tilelab.kernels.softmax import softmax

__all__ = [
    "SGD",
    "AdamW",
    "bias_activation",
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

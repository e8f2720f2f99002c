"""GPU operators in pure Python, one lesson a file. Start with kernels/README.md."""

import kernels._launch  # noqa: F401  first: it chooses GPU or interpreter, before triton is imported
from kernels.bias_relu import bias_relu
from kernels.matmul import matmul

__all__ = ["bias_relu", "matmul"]

"""The machine imports triton, and tilelab.kernels has to come first: it picks the interpreter."""

from tilelab import kernels  # noqa: F401

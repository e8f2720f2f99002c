"""Tensor cores: products of matrices that lie in the registers of a warp, or in shared memory."""

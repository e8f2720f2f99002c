"""Matrix descriptors: how wgmma finds a matrix in shared memory, and what a swizzle is for.

wgmma multiplies matrices that lie in shared memory. An operand is 32 bytes of K deep (16 numbers of
f16 or bf16, 8 of tf32, 32 of 8 bits); A has 64 rows, B has n columns. Where its bytes are is said
by a *descriptor*, 64 bits in a register:

    bits   0-13   start address / 16
          16-29   leading byte offset / 16
          32-45   stride byte offset / 16
          49-51   base offset: 0 where the swizzle pattern begins at a multiple of its own size
          62-63   swizzle: 0 none, 1 of 128 bytes, 2 of 64, 3 of 32

The matrix is made of *core matrices*: 8 rows of 16 bytes. K-major means that the 16 bytes run along
K; the eight rows are then eight rows of A, or eight columns of B. MN-major, the transposed form, is
for 16-bit numbers only: the 16 bytes run along M (or N), the eight rows are eight steps of K.
Without a swizzle a core matrix is 128 bytes in a run. With a swizzle of S bytes, S / 16 core
matrices lie side by side and share each run of S bytes:

    no swizzle            S = 64
    0: row 0              row 0 of 0 | row 0 of 1 | row 0 of 2 | row 0 of 3
       row 1              row 1 of 0 | row 1 of 1 | row 1 of 2 | row 1 of 3
       ...                ...
       row 7              row 7 of 0 | row 7 of 1 | row 7 of 2 | row 7 of 3

The descriptor's two offsets say where the next ones are:

    from core matrix to core matrix      no swizzle    swizzle
    K-major    along M or N              stride        stride
               along K                   leading       16 bytes (they lie side by side)
    MN-major   along M or N              stride        16 bytes, then leading to the next run of S
               along K                   leading       stride

What a swizzle is for. Shared memory has 32 banks of 4 bytes, so 128 bytes come in one pass if they
are of different banks. A run of 128 bytes is no trouble. But the eight rows of one core matrix are
S bytes apart: with S = 128 all eight would be of the same four banks, in eight passes. So piece c
(16 bytes) of row r goes to slot c XOR r. In bits: address bits 4-6 are XORed with bits 7-9.

             slot 0  1  2  3  4  5  6  7
      row 0       0  1  2  3  4  5  6  7       core matrix 0 was a column of zeros;
      row 1       1  0  3  2  5  4  7  6       now it is a diagonal: eight slots,
      row 2       2  3  0  1  6  7  4  5       32 banks, one pass
      row 3       3  2  1  0  7  6  5  4
      ...

Two rows of a 64-byte swizzle share 128 bytes of banks, four of a 32-byte one: they XOR two bits and
one bit. The pattern hangs on the address and not on the matrix. So a descriptor may start inside
it, for example 32 bytes further for the next step of K, and TMA, which writes it, need not know.

Sources: PTX ISA 9.0, sections 9.7.15.5.1.2 (layouts, table of canonical layouts), 9.7.15.5.1.2.2
(descriptor), 5.5.7 (swizzles); CUTLASS, include/cute/atom/mma_traits_sm90_gmma.hpp.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # descriptor bits 62-63 -> bytes


class Descriptor(NamedTuple):
    """A matrix in shared memory; all in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle: int


def decode(bits: int) -> Descriptor:
    """The fields of a matrix descriptor."""

    def field(first: int) -> int:
        return (bits >> first & 0x3FFF) << 4

    return Descriptor(field(0), field(16), field(32), bits >> 49 & 7, SWIZZLES[bits >> 62 & 3])


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where a swizzle of `span` bytes (0, 32, 64 or 128) puts the byte of an address."""
    if not span:
        return address
    return address ^ ((address >> 7 & (span // 16 - 1)) << 4)


@lru_cache(maxsize=4096)
def pieces(bits: int, extent: int, mn_major: bool) -> np.ndarray:
    """The addresses of the 16-byte pieces of an operand, as a descriptor says.

    Args:
        bits: the descriptor.
        extent: rows of A or columns of B.
        mn_major: along them the 16 bytes run, else along K.

    Returns:
        [extent, 2] of a K-major operand (32 bytes of K are two pieces), [16, extent / 8] of an
        MN-major one, which is of 16-bit elements: K is 16.
    """
    d = decode(bits)
    if not mn_major:
        row, piece = np.arange(extent)[:, None], np.arange(2)
        run, step = (d.swizzle, 16) if d.swizzle else (16, d.leading)
        return swizzled(d.start + row % 8 * run + row // 8 * d.stride + piece * step, d.swizzle)
    k, piece = np.arange(16)[:, None], np.arange(extent // 8)
    if d.swizzle:
        side = d.swizzle // 16  # core matrices side by side
        along = piece % side * 16 + piece // side * d.leading
        return swizzled(d.start + along + k % 8 * d.swizzle + k // 8 * d.stride, d.swizzle)
    return d.start + piece * d.stride + k % 8 * 16 + k // 8 * d.leading

"""When is a kernel's result right? One rule for every test, derived here and not tuned per test.

The reference is computed in float64 from the inputs as they are, already rounded to their dtype, so
the rounding of the inputs counts for nothing. The error is normalised by the largest |reference|,
since the absolute error of a sum does not shrink where the sum happens to be small. What is left:

    bound = roundings * u(dtype) + 2 * eps(sum) * sqrt(terms)     [+ 2 * eps(tf32)]

- `u(dtype) = eps(dtype) / 2` is the error of rounding the result to its dtype, once. An operation
  that rounds in between as well (a chain of two kernels) says `roundings=2`.
- A sum of `terms` products, in float32 but for one case: each addition rounds its partial sum, by
  u(float32) at most and with either sign. For random signs the partial sum after k terms is
  ~ sqrt(k), the errors add as squares to u * sqrt(1 + 2 + ... + terms) ~ 0.7 u * terms, and the
  largest result is a few times sqrt(terms): so the normalised error is below u * sqrt(terms). For
  terms of one sign the partial sum is ~ k and the result ~ terms: u * sqrt(terms / 3). The bound
  has four times u * sqrt(terms): twice for the rounding of float32 products, and twice because
  tensor cores truncate where IEEE arithmetic rounds.
- TF32 keeps 10 bits of each operand's mantissa, and may truncate them: eps(tf32) = 2**-10 for each
  of the two operands.
- The one case: Hopper adds up products of float8 in about 14 bits, truncating. eps(sum) = 2**-13,
  and the same rule. It holds for random signs; terms of one sign all lose in one direction, and
  may add up to 2**-13 * terms.

A bound is worth little if wrong results pass as well. So each passing comparison then shows its
teeth: zeros, the result shifted by one along each dimension, and its transpose must all fail.
test_tolerance.py is the test of this file.
"""

import math

import torch

EPS_TF32 = 2.0**-10
EPS_FP8_SUM = 2.0**-13


def bound(
    dtype: torch.dtype, terms: int, roundings: int = 1, tf32: bool = False, fp8: bool = False
) -> float:
    """The largest acceptable error, relative to the largest |reference|."""
    u = torch.finfo(dtype).eps / 2
    eps = EPS_FP8_SUM if fp8 else torch.finfo(torch.float32).eps
    accumulated = 2 * eps * math.sqrt(max(terms, 1))
    # 1.001: the reference is rounded too, and the largest element may round up
    return 1.001 * (roundings * u + accumulated + (2 * EPS_TF32 if tf32 else 0.0))


def assert_close(
    got: torch.Tensor,
    ref64: torch.Tensor,
    *,
    dtype: torch.dtype,
    terms: int,
    roundings: int = 1,
    tf32: bool = False,
    fp8: bool = False,
    smallest: float = 1e-3,
    teeth: bool = True,
    name: str = "result",
) -> None:
    """Raise AssertionError unless `got` is `ref64`, rounded to `dtype`, within `bound`.

    Args:
        got: what the kernel returned: of `dtype`, and of the shape and device of `ref64`.
        ref64: the reference, computed in float64 from the same (already rounded) inputs. NaN and
            infinities must be at the same places in both.
        dtype: the dtype that the result must have.
        terms: how many products or values one element of the result is a sum of (K of a matmul).
        roundings: how often values are rounded to `dtype` on the way.
        tf32: whether float32 products may have been rounded to TF32.
        fp8: whether products of float8 may have been added up as Hopper does.
        smallest: refuse a reference whose largest |element| is below this: it proves nothing. Pass
            a smaller one where it is right that the values are small.
        teeth: also prove that wrong results would fail. Pass False, with the reason, where the
            right result looks the same when it is shifted or transposed (a constant, say).
        name: for the message.
    """
    assert isinstance(got, torch.Tensor), f"{name} is no tensor but {type(got).__name__}"
    assert ref64.dtype == torch.float64, f"the reference of {name} must be float64: {ref64.dtype}"
    for what, have, want in [
        ("dtype", got.dtype, dtype),
        ("shape", list(got.shape), list(ref64.shape)),
        ("device", got.device, ref64.device),
    ]:
        assert have == want, f"{name} has {what} {have}, expected {want}"
    ref64 = ref64.detach()
    if ref64.numel() == 0:
        return
    finite = ref64.isfinite()
    if finite.any():
        scale = ref64[finite].abs().max().item()
        least = max(smallest, torch.finfo(dtype).tiny)  # below tiny, rounding is coarser than u
        assert scale >= least, f"the reference of {name} is tiny, {scale:.2g}: it proves nothing"

    limit = bound(dtype, terms, roundings, tf32, fp8)
    problem = compare(got, ref64, limit)
    assert problem is None, f"{name}: {problem}"
    if teeth:
        for what, wrong in wrong_results(ref64):
            assert compare(wrong.to(dtype), ref64, limit) is not None, (
                f"no teeth: {name} would pass as well if it were {what}; choose other values, or "
                "say teeth=False and why"
            )


def compare(got: torch.Tensor, ref64: torch.Tensor, limit: float) -> str | None:
    """What is wrong with `got`, or None."""
    got = got.detach().double()
    finite = ref64.isfinite()
    special = ~finite | ~got.isfinite()
    same = (got == ref64) | (got.isnan() & ref64.isnan())
    if (special & ~same).any():
        return f"NaN or infinity {_first(special & ~same, got, ref64)}"
    if not finite.any():
        return None
    scale = ref64[finite].abs().max()
    error = torch.where(finite, (got - ref64).abs() / scale, 0.0)
    worst = error.max().item()
    if worst <= limit:
        return None
    return (
        f"error {worst:.3g} > {limit:.3g} (of the largest |reference|, {scale.item():.3g}) "
        f"{_first(error > limit, got, ref64)}"
    )


def wrong_results(ref64: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What typical bugs would return. Zeros alone for few elements: two may be equal by chance."""
    wrong = [("all zeros", torch.zeros_like(ref64))]
    if ref64.numel() >= 8:
        for dim, size in enumerate(ref64.shape):
            if size > 1:
                wrong.append((f"shifted by one along dim {dim}", ref64.roll(1, dim)))
        if ref64.dim() >= 2 and ref64.shape[-1] == ref64.shape[-2] > 1:
            wrong.append(("transposed", ref64.mT))
    return wrong


def _first(bad: torch.Tensor, got: torch.Tensor, ref64: torch.Tensor) -> str:
    at = bad.nonzero()[0].tolist()
    return (
        f"at {int(bad.sum())} of {bad.numel()} elements, the first at {at}: "
        f"got {got[tuple(at)].item():.9g}, expected {ref64[tuple(at)].item():.9g}"
    )

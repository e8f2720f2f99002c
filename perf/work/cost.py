"""FLOPs and bytes of every operator: what the mathematics asks for, whoever computes it.

They are the yardstick. Every implementation of a workload is given the same FLOPs and the same
bytes, so that TFLOP/s and GB/s compare as times do, and the share of a GPU's peak means something:

    FLOPs    a multiply and an add are two. An operation that padding, whole tiles or a slower
             algorithm add does not count.
    bytes    every input read once, every result written once, nothing in between. Only the pixels
             that some window reads count: a 1x1 convolution of stride 2 reads a quarter.

    e  bytes of an element          n  elements          P, Q  height and width of the output
    MACs of a convolution  =  N P Q K (C / groups) R S,  the same forward and for both gradients

    op                 mode            FLOPs             bytes
    matmul             fwd             2 M N K           e (M K + K N + M N), read A B, write C
                       dgrad, wgrad    2 M N K           the same: each of A, B, C in another role
    matmul_bias_relu   fwd             2 M N K           the same, and e N for the bias
    matmul_bias_gelu   fwd             2 M N K           the same as matmul_bias_relu
    scaled_matmul      fwd             2 M N K           e (M K + K N) + 2 M N, e of A and B
    conv2d,            fwd             2 MACs            e (x + w + y)
    conv2d_im2col      dgrad           2 MACs            e (dy + w + dx)
                       wgrad           2 MACs            e (x + dy + dw)
    conv2d_bias_relu   fwd             2 MACs            the same, and e K for the bias
    conv2d_relu_pool   fwd             2 MACs            e (x + w + bias + y)
                       dgrad           2 MACs            e (dy + w + dx) + y places
                       wgrad           2 MACs            e (x + dy + dw + dbias) + y places
    bias_relu          fwd             2 n               2 n e
                       bwd             2 n               3 n e, read dy and y, write dx
    bias_gelu          fwd             6 n               2 n e, an erf counts as one FLOP
                       bwd             13 n              3 n e, read dy and x, write dx
    softmax            fwd             5 n               2 n e
                       bwd             4 n               3 n e, read dy and y, write dx
    cross_entropy      fwd             5 n               n e
                       fwdbwd          7 n               2 n e, write the gradient too
    max_pool2d         fwd             y (R R - 1)       e (x + y)
                       bwd             y                 e (dy + dx) + y places
    im2col             fwd             0                 e (x + columns)
    col2im             fwd             N P Q C R S       e (columns + x)
    sgd                step            4 n               5 n e, read p g m, write p m
    adamw              step            14 n              7 n e, read p g m v, write p m v
    train_step         step            see `train_step_flops` and `train_step_bytes`
    conv_stack         step            see `stack_flops` and `stack_bytes`

The formulas leave out what is small: the classes and losses of a cross-entropy (a few bytes a row),
the bias and its gradient in bias_relu and bias_gelu, and the scales of scaled_matmul. The results
of scaled_matmul are bfloat16, whatever its operands are.

"places" says where each maximum was, in conv2d_relu_pool and max_pool2d: one byte an output, enough
for windows of up to 16 x 16. Both keep exactly that; PyTorch keeps eight. The forward mode counts
no places, because inference needs none.

A cross-entropy could write the gradient while it has the row, 2 n e in all, if it knew before its
loss which gradient comes down. Our backward reads the logits again, 3 n e in all, and so does
torch.compile.

conv2d_relu_pool counts the outputs that are pooled: P and Q are rounded down to even, because the
last row or column of an odd size is not pooled. Its gradients count as those of a dense
convolution, though three of four elements of dz are zero: no hardware can leave them out.

conv2d_im2col has conv2d's minimum. The matrix that it writes and reads, 2 N P Q C R S e bytes more,
is its own choice; the field "moved" of a row counts it.
"""

import itertools
import math
from collections.abc import Callable, Iterator

from tilelab.perf.work import networks
from tilelab.perf.work.networks import Conv, Pool

Sizes = dict[str, int]
Cost = tuple[Callable[[Sizes], int], Callable[[Sizes, int], int]]  # FLOPs; bytes, e of an element


def per_element(flops: int, moved: int) -> Cost:
    """The cost of work that has as many FLOPs, and elements moved, for each element there is.

    The FLOPs of one element. softmax: take the maximum, subtract it, exp, sum, divide; back:
    multiply, sum, subtract, multiply. cross_entropy: maximum, subtract, exp, sum, and the mean that
    label smoothing needs; with the gradient divide and subtract. SGD: m = mu m + g; p = p - lr m.
    AdamW: m 3, v 4, p 7: decay, root, its scale, + eps, divide, step size, subtract.
    """
    return lambda s: flops * elements(s), lambda s, e: moved * elements(s) * e


def elements(s: Sizes) -> int:
    """The product of all sizes."""
    return math.prod(s.values())


# --- products and convolutions -------------------------------------------------------------------


def product_flops(s: Sizes) -> int:
    """FLOPs of a product, or of one of its gradients."""
    return 2 * s["M"] * s["N"] * s["K"]


def product_bytes(s: Sizes, e: int) -> int:
    """Bytes of a product, or of one of its gradients."""
    return e * (s["M"] * s["K"] + s["K"] * s["N"] + s["M"] * s["N"])


def conv_flops(s: Sizes) -> int:
    """FLOPs of a convolution, or of one of its gradients."""
    P, Q = output_size(s)
    return 2 * s["N"] * P * Q * weights(s)


def conv_bytes(s: Sizes, e: int) -> int:
    """Bytes of a convolution, or of its weight gradient: read pixels, weights, outputs."""
    return e * (read(s) + weights(s) + outputs(s))


def conv_dgrad_bytes(s: Sizes, e: int) -> int:
    """Bytes of a convolution's input gradient: the whole image is written."""
    return e * (outputs(s) + weights(s) + image(s))


def fused_flops(s: Sizes) -> int:
    """FLOPs of a convolution as far as its outputs are pooled, or of one of its gradients."""
    P, Q = output_size(s)
    return 2 * s["N"] * (P // 2 * 2) * (Q // 2 * 2) * weights(s)


def fused_bytes(s: Sizes, e: int) -> int:
    """Bytes of a convolution, its ReLU and its pool."""
    P, Q = output_size(s)
    return e * (read(s, P // 2 * 2, Q // 2 * 2) + weights(s) + s["K"] + places(s))


def fused_dgrad_bytes(s: Sizes, e: int) -> int:
    """Bytes of the fused block's input gradient."""
    return e * (places(s) + weights(s) + image(s)) + places(s)


def fused_wgrad_bytes(s: Sizes, e: int) -> int:
    """Bytes of the fused block's gradients of weight and bias."""
    return fused_bytes(s, e) + places(s)


def places(s: Sizes) -> int:
    """Outputs of the fused block, and the bytes that say where their maxima were."""
    P, Q = output_size(s)
    return s["N"] * s["K"] * (P // 2) * (Q // 2)


def columns(s: Sizes) -> int:
    """Elements of the matrix that im2col makes."""
    P, Q = output_size(s)
    return s["N"] * P * Q * s["C"] * s["R"] * s["S"]


# --- whole training steps ------------------------------------------------------------------------


def train_step_flops(s: Sizes) -> int:
    """FLOPs of a training step of the demo CNN (nets/models.py) on N images.

    Those of its two convolutions and its linear layer, three times: forward, input gradient and
    weight gradient; without the input gradient of the first, which nobody needs. Everything else
    (ReLU, pools, loss, optimizer) is left out: about 2%.
    """
    first, second, linear = _demo_layers(s["N"])
    return 2 * fused_flops(first) + 3 * fused_flops(second) + 3 * product_flops(linear)


def train_step_bytes(s: Sizes, e: int) -> int:
    """Bytes of a training step of the demo CNN on N images, in `train_step_launches`.

    A launch forgets what it had, so what the next one needs goes through memory. With the image,
    each layer's output y_i, where its maxima were (a byte an output), and parameters w_i:

        forward of layer i      read y_{i-1}, w_i                  write y_i, and the places
        loss and its gradient   read logits                        write dlogits
        backward of layer i     read dy_i, places, y_{i-1}, w_i    write dy_{i-1}, dw_i
        AdamW                   read dw, and p, m, v in float32    write p, m, v, and w

    where backward makes both gradients at once, the first layer has no dy_0 and needs no w_1, and
    elements have `e` bytes: with 2, w is the 16-bit copy of p, which makes 28 bytes a parameter
    either way. Labels and losses, 12 bytes an image, are left out.
    """
    first, second, linear = _demo_layers(s["N"])
    total = 2 * e * elements({"M": s["N"], "N": linear["N"]})  # the loss, and its gradient
    total += 28 * networks.demo().parameters  # AdamW
    for sizes in (first, second):
        total += fused_bytes(sizes, e) + places(sizes) + fused_wgrad_bytes(sizes, e)
    # The input gradient reads what the weight gradient has read: dy and the places.
    total += fused_dgrad_bytes(second, e) - (e + 1) * places(second)
    bias, dy = e * linear["N"], e * linear["M"] * linear["N"]
    return total + 3 * product_bytes(linear, e) + 2 * bias - dy


def train_step_launches() -> int:
    """The fewest launches of a step: each layer's two, the loss's, and the optimizer's."""
    return 2 * len(_demo_layers(1)) + 2


def _demo_layers(N: int) -> tuple[Sizes, Sizes, Sizes]:
    """The sizes of the demo CNN's two convolutions, each with its pool, and of its linear layer."""
    first, pool, second, _, linear = networks.demo().layers
    block = networks.convolution_relu_and_pool
    return block(first, pool, N), block(second, pool, N), networks.product(linear, None, N)


def stack_flops(s: Sizes) -> int:
    """FLOPs of VGG16's convolutions, forward and backward.

    Each layer forward with bias, ReLU and, where one follows, its pool; its weight gradient; and
    its input gradient, but for the first.
    """
    total = 0
    for i, (sizes, pooled) in enumerate(_stack_layers(s)):
        total += (3 if i else 2) * (fused_flops if pooled else conv_flops)(sizes)
    return total


def stack_bytes(s: Sizes, e: int) -> int:
    """Bytes of VGG16's convolutions, forward and backward.

    The ReLU's own gradient is left out: whoever computes dx has what to mask it with
    (conv2d_stack.py). A pool writes where its maxima were.
    """
    total = 0
    for i, (sizes, pooled) in enumerate(_stack_layers(s)):
        if pooled:
            total += fused_bytes(sizes, e) + places(sizes) + fused_wgrad_bytes(sizes, e)
        else:
            total += 2 * conv_bytes(sizes, e) + e * sizes["K"]
        if i:
            total += (fused_dgrad_bytes if pooled else conv_dgrad_bytes)(sizes, e)
    return total


def _stack_layers(s: Sizes) -> Iterator[tuple[Sizes, bool]]:
    """The sizes of each of VGG16's convolutions, and whether a pool follows."""
    for layer, following in itertools.pairwise(networks.vgg16(s["H"], s["width"]).layers):
        if isinstance(layer, Conv):
            yield networks.convolution(layer, following, s["N"]), isinstance(following, Pool)


# --- windows -------------------------------------------------------------------------------------


def output_size(s: Sizes) -> tuple[int, int]:
    """(P, Q), how many windows fit: (H + 2 padding - dilation (R - 1) - 1) // stride + 1."""
    P, Q = (len(_starts(s, size, taps)) for size, taps in _sides(s))
    return P, Q


def conv_misfit(s: Sizes) -> str | None:
    """Why these sizes are no convolution's; None if they are."""
    if misfit := _window_misfit(s):
        return misfit
    if s["C"] % s["groups"] or s.get("K", s["C"]) % s["groups"]:
        filters = f" and K={s['K']}" if "K" in s else ""
        return f"groups={s['groups']} must divide C={s['C']}{filters}"
    return None


def fused_misfit(s: Sizes) -> str | None:
    """Why these sizes are no convolution's that is pooled; None if they are."""
    if misfit := conv_misfit(s):
        return misfit
    if (s["stride"], s["dilation"], s["groups"]) != (1, 1, 1):
        return "stride, dilation and groups must be 1"
    return "nothing is left of the convolution to pool" if min(output_size(s)) < 2 else None


def pool_misfit(s: Sizes) -> str | None:
    """Why these sizes are no max-pool's; None if they are."""
    if misfit := _window_misfit(s):
        return misfit
    return "padding must be half of the window at most" if s["padding"] > s["R"] // 2 else None


def stack_misfit(s: Sizes) -> str | None:
    """Why these sizes are no stack's; None if they are."""
    small = s["H"] < 32
    return "five pools leave nothing of an image of less than 32 x 32" if small else None


def _window_misfit(s: Sizes) -> str | None:
    (_, R), (_, S) = _sides(s)
    fits = min(output_size(s)) > 0
    return None if fits else f"{R} x {S} taps do not fit into the padded image"


def image(s: Sizes) -> int:
    """Elements of the image."""
    return s["N"] * s["C"] * s["H"] * s["W"]


def outputs(s: Sizes) -> int:
    """Elements of the result; a pool has no filters, and keeps the channels."""
    P, Q = output_size(s)
    return s["N"] * s.get("K", s["C"]) * P * Q


def weights(s: Sizes) -> int:
    """Elements of a convolution's weight, [K, C / groups, R, S]."""
    return s["K"] * (s["C"] // s["groups"]) * s["R"] * s["S"]


def _sides(s: Sizes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Extent and taps of the image's two sides."""
    return (s["H"], s["R"]), (s["W"], s.get("S", s["R"]))


def _starts(s: Sizes, size: int, taps: int) -> range:
    """Where the windows along one side begin."""
    padding, last = s["padding"], s.get("dilation", 1) * (taps - 1)
    return range(-padding, size + padding - last, s["stride"])


def read(s: Sizes, *first: int) -> int:
    """Elements of the image that windows read: of all outputs, or of the first of each side."""
    total, dilation = s["N"] * s["C"], s.get("dilation", 1)
    for (size, taps), count in zip(_sides(s), first or (None, None), strict=True):
        starts, inside = _starts(s, size, taps)[:count], range(size)
        total *= len(
            {at for p in starts for r in range(taps) if (at := p + r * dilation) in inside}
        )
    return total

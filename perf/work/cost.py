"""FLOPs and bytes of every operator: what the mathematics asks for, whoever computes it.

They are the yardstick. Every implementation of a workload is given the same FLOPs and the same
bytes, so that TFLOP/s and GB/s compare as times do, and the share of a GPU's peak means something:

    FLOPs    a multiply and an add are two. An operation that padding, whole tiles or a slower
             algorithm add does not count.
    bytes    every input read once, every result written once, nothing in between. Of an input only
             the pixels that some window reads: a 1x1 convolution of stride 2 reads a quarter.

    e  bytes of an element          n  elements          P, Q  height and width of the output
    MACs of a convolution  =  N P Q K (C / groups) R S,  the same forward and for both gradients

    op                 mode            FLOPs             bytes
    matmul             fwd             2 M N K           e (M K + K N + M N), read A B, write C
                       dgrad, wgrad    2 M N K           the same: each of A, B, C in another role
    matmul_bias_relu   fwd             2 M N K           the same, and e N for the bias
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
    conv_stack         step            see `_stack_layers`

What is left out is small beside the rest: the classes and losses of a cross-entropy (a few bytes a
row), the bias and its gradient in bias_relu, the scales of scaled_matmul, whose results are
bfloat16 whatever its operands.

Where a maximum was is one byte an output, in conv2d_relu_pool and max_pool2d: enough for windows of
up to 16 x 16. Both keep exactly that; PyTorch keeps eight. Forward, nothing is kept: that is what
inference needs.

A cross-entropy that knew what comes down before its loss is known could write the gradient while it
has the row: 2 n e. Our backward reads the logits again, 3 n e in all, and so does torch.compile.

conv2d_relu_pool counts the outputs that are pooled: of an odd P or Q the last is not, so P and Q
are rounded down to even. Its gradients count as those of a dense convolution, though three of four
elements of dz are zero: nobody's hardware can leave them out.

conv2d_im2col has conv2d's minimum. The matrix that it writes and reads, 2 N P Q C R S e bytes more,
is its own choice; a row's "moved" has it.
"""

import itertools

from tilelab.perf.errors import PerfError
from tilelab.perf.work.shapes import Conv, Pool, demo, shapes, sizes_of, vgg16

MODES = {
    **dict.fromkeys(
        ("matmul", "conv2d", "conv2d_im2col", "conv2d_relu_pool"), ("fwd", "dgrad", "wgrad")
    ),
    **dict.fromkeys(("bias_relu", "softmax", "max_pool2d"), ("fwd", "bwd")),
    "cross_entropy": ("fwd", "fwdbwd"),
    "matmul_bias_relu": ("fwd",),
    "conv2d_bias_relu": ("fwd",),
    "scaled_matmul": ("fwd",),
    "im2col": ("fwd",),
    "col2im": ("fwd",),
    **dict.fromkeys(("sgd", "adamw", "train_step", "conv_stack"), ("step",)),
}
# An element's FLOPs. softmax: take the maximum, subtract it, exp, sum, divide; back: multiply, sum,
# subtract, multiply. cross_entropy: maximum, subtract, exp, sum, and the mean that label smoothing
# needs; with the gradient divide and subtract. SGD: m = mu m + g; p = p - lr m. AdamW: m 3, v 4,
# p 7: decay, root, its scale, + eps, divide, step size, subtract.
_PER_ELEMENT = {
    ("bias_relu", "fwd"): (2, 2),  # FLOPs, elements read and written
    ("bias_relu", "bwd"): (2, 3),
    ("softmax", "fwd"): (5, 2),
    ("softmax", "bwd"): (4, 3),
    ("cross_entropy", "fwd"): (5, 1),
    ("cross_entropy", "fwdbwd"): (7, 2),
    ("sgd", "step"): (4, 5),
    ("adamw", "step"): (14, 7),
}


def flops(op: str, mode: str, shape: dict[str, int]) -> int:
    """Return the floating-point operations of one call; the table above has the formulas.

    Args:
        op: the operator, a key of MODES.
        mode: one of MODES[op].
        shape: sizes with the keys of perf/work/shapes.py.

    Raises:
        PerfError: for an operator or mode that does not exist.
    """
    _check(op, mode)
    if (op, mode) in _PER_ELEMENT:
        return _PER_ELEMENT[op, mode][0] * _elements(shape)
    if op in ("matmul", "matmul_bias_relu", "scaled_matmul"):
        return 2 * shape["M"] * shape["N"] * shape["K"]
    if op == "train_step":
        return train_step_flops(shape["N"])
    if op == "conv_stack":
        return sum(flops(*work) for work in _stack_layers(shape))
    P, Q = output_size(shape)
    if op == "im2col":
        return 0
    if op == "col2im":
        return shape["N"] * P * Q * shape["C"] * shape["R"] * shape["S"]
    if op == "max_pool2d":
        outputs = shape["N"] * shape["C"] * P * Q
        return outputs * (shape["R"] ** 2 - 1) if mode == "fwd" else outputs
    if op == "conv2d_relu_pool":
        P, Q = P // 2 * 2, Q // 2 * 2
    return 2 * shape["N"] * P * Q * _weights(shape)


def minimum_bytes(op: str, mode: str, shape: dict[str, int], itemsize: int) -> int:
    """Return the bytes that one call must read and write at least; the table has the formulas.

    Args:
        op: the operator, a key of MODES.
        mode: one of MODES[op].
        shape: sizes with the keys of perf/work/shapes.py.
        itemsize: bytes of an element: of all tensors alike, but of scaled_matmul's operands only.

    Raises:
        PerfError: for an operator or mode that does not exist.
    """
    _check(op, mode)
    if (op, mode) in _PER_ELEMENT:
        return _PER_ELEMENT[op, mode][1] * _elements(shape) * itemsize
    if op in ("matmul", "matmul_bias_relu"):
        M, N, K = shape["M"], shape["N"], shape["K"]
        bias = N if op == "matmul_bias_relu" else 0
        return itemsize * (M * K + K * N + bias + M * N)
    if op == "scaled_matmul":
        return itemsize * (shape["M"] + shape["N"]) * shape["K"] + 2 * shape["M"] * shape["N"]
    if op == "train_step":
        return train_step_bytes(shape["N"], itemsize)
    if op == "conv_stack":
        work = _stack_layers(shape)
        return sum(minimum_bytes(*w, itemsize) for w in work) + sum(map(_places, work))
    return _window_bytes(op, mode, shape, itemsize)


def train_step_flops(N: int) -> int:
    """Return the FLOPs of a training step of the demo CNN (nets/models.py) on N images.

    Those of its two convolutions and its linear layer, three times: forward, input gradient and
    weight gradient; without the input gradient of the first, which nobody needs. Everything else
    (ReLU, pools, loss, optimizer) is left out: about 2%.
    """
    total = 0
    for op, layers in _demo_layers(N).items():
        for sizes, modes in layers:
            total += sum(flops(op, mode, sizes) for mode in modes)
    return total


def train_step_bytes(N: int, itemsize: int) -> int:
    """Return the bytes of a training step of the demo CNN on N images, in `train_step_launches`.

    A launch forgets what it had, so what the next one needs goes through memory. With the image,
    each layer's output y_i, where its maxima were (a byte an output), and parameters w_i:

        forward of layer i      read y_{i-1}, w_i                  write y_i, and the places
        loss and its gradient   read logits                        write dlogits
        backward of layer i     read dy_i, places, y_{i-1}, w_i    write dy_{i-1}, dw_i
        AdamW                   read dw, and p, m, v in float32    write p, m, v, and w

    where backward makes both gradients at once, the first layer has no dy_0 and needs no w_1, and
    elements have `itemsize` bytes: with 2, w is the 16-bit copy of p, which makes 28 bytes a
    parameter either way. Labels and losses, 12 bytes an image, are left out.
    """
    total = minimum_bytes("cross_entropy", "fwdbwd", {"M": N, "N": 10}, itemsize)
    total += minimum_bytes("adamw", "step", {"tensors": 1, "elements": demo().parameters}, 4)
    for op, layers in _demo_layers(N).items():
        for sizes, modes in layers:
            total += sum(minimum_bytes(op, mode, sizes, itemsize) for mode in modes)
            if op == "matmul":
                outputs, places, bias = sizes["M"] * sizes["N"], 0, sizes["N"]
            else:
                P, Q = output_size(sizes)
                outputs = places = sizes["N"] * sizes["K"] * (P // 2) * (Q // 2)
                bias = 0  # the convolutions' modes count it
            total += places + 2 * bias * itemsize  # written; read, and its gradient written
            if "dgrad" in modes:  # not read again for the second gradient
                total -= outputs * itemsize + places
    return total


def train_step_launches() -> int:
    """Return the fewest launches of a step: each layer's two, the loss's, and the optimizer's."""
    return 2 * sum(map(len, _demo_layers(1).values())) + 2


def _stack_layers(shape: dict[str, int]) -> list[tuple[str, str, dict[str, int]]]:
    """Return what VGG16's convolutions compute, forward and backward: operator, mode, sizes.

    Each layer forward with bias, ReLU and, where one follows, its pool; its weight gradient; and
    its input gradient, but for the first. The ReLU's own gradient is none of them: whoever computes
    dx has what to mask it with (conv2d_stack.py).
    """
    layers = vgg16(shape["H"], shape["width"]).layers
    work = []
    for layer, following in itertools.pairwise(layers):
        if isinstance(layer, Conv):
            op = "conv2d_relu_pool" if isinstance(following, Pool) else "conv2d_bias_relu"
            sizes = sizes_of("conv2d", layer, following, shape["N"])
            grad = op if op == "conv2d_relu_pool" else "conv2d"
            modes = ("dgrad", "wgrad") if work else ("wgrad",)
            work += [(op, "fwd", sizes), *((grad, mode, sizes) for mode in modes)]
    return work


def _places(work: tuple[str, str, dict[str, int]]) -> int:
    """Return the bytes of the places that a pool writes in training."""
    op, mode, sizes = work
    if (op, mode) != ("conv2d_relu_pool", "fwd"):
        return 0
    P, Q = output_size(sizes)
    return sizes["N"] * sizes["K"] * (P // 2) * (Q // 2)


def output_size(shape: dict[str, int]) -> tuple[int, int]:
    """Return (P, Q), how many windows fit: (H + 2 padding - dilation (R - 1) - 1) // stride + 1."""
    P, Q = (len(_starts(shape, size, taps)) for size, taps in _sides(shape))
    return P, Q


def _demo_layers(N: int) -> dict[str, list[tuple[dict[str, int], tuple[str, ...]]]]:
    """Return the demo CNN's products: sizes, and the modes that a training step computes."""
    convolutions = [shape.sizes for shape in shapes("conv2d_relu_pool", f"demo@{N}")]
    every = ("fwd", "dgrad", "wgrad")
    return {
        "conv2d_relu_pool": [
            (sizes, every if i else ("fwd", "wgrad")) for i, sizes in enumerate(convolutions)
        ],
        "matmul": [(shape.sizes, every) for shape in shapes("matmul", f"demo@{N}")],
    }


def _window_bytes(op, mode, shape, itemsize):
    """The minimum of the operators that slide a window over an image."""
    N, C, H, W = (shape[key] for key in "NCHW")
    P, Q = output_size(shape)
    image, read = N * C * H * W, N * C * _touched(shape)
    if op in ("im2col", "col2im"):
        columns = N * P * Q * C * shape["R"] * shape["S"]
        return itemsize * (columns + (read if op == "im2col" else image))
    if op == "max_pool2d":
        y = N * C * P * Q
        return itemsize * (read + y) if mode == "fwd" else itemsize * (image + y) + y
    weights, bias, places = _weights(shape), 0, 0
    y = N * shape["K"] * P * Q
    if op == "conv2d_bias_relu":
        bias = shape["K"]
    if op == "conv2d_relu_pool":
        y, bias = N * shape["K"] * (P // 2) * (Q // 2), shape["K"]
        read = N * C * _touched(shape, P // 2 * 2, Q // 2 * 2)
        places = 0 if mode == "fwd" else y
    if mode == "dgrad":
        return itemsize * (y + weights + image) + places
    return itemsize * (read + weights + bias + y) + places


def _weights(shape: dict[str, int]) -> int:
    """Elements of a convolution's weight, [K, C / groups, R, S]."""
    return shape["K"] * (shape["C"] // shape["groups"]) * shape["R"] * shape["S"]


def _sides(shape: dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Extent and taps of the image's two sides."""
    return (shape["H"], shape["R"]), (shape["W"], shape.get("S", shape["R"]))


def _starts(shape: dict[str, int], size: int, taps: int) -> range:
    """Where the windows along one side begin."""
    padding, last = shape["padding"], shape.get("dilation", 1) * (taps - 1)
    return range(-padding, size + padding - last, shape["stride"])


def _touched(shape: dict[str, int], *outputs: int) -> int:
    """Pixels of a channel that windows read: all of them, or the first `outputs` of a side."""
    total, dilation = 1, shape.get("dilation", 1)
    for (size, taps), count in zip(_sides(shape), outputs or (None, None), strict=True):
        starts = _starts(shape, size, taps)[:count]
        inside = range(size)
        total *= len(
            {at for p in starts for r in range(taps) if (at := p + r * dilation) in inside}
        )
    return total


def _elements(shape: dict[str, int]) -> int:
    total = 1
    for size in shape.values():
        total *= size
    return total


def _check(op: str, mode: str) -> None:
    if op not in MODES:
        raise PerfError(f"unknown operator {op!r}: there are {', '.join(MODES)}")
    if mode not in MODES[op]:
        raise PerfError(f"{op} has no mode {mode!r}: it has {', '.join(MODES[op])}")

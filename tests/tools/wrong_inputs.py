"""Wrong input of every operator, and what it must raise: {reason: (arguments, error, message)}.

The message is a regular expression. The contract suite (test_contracts.py) checks that each call is
refused before any launch. If an entry has four members, the second is a dict of further options.
"""

import math

import torch

from tilelab.kernels import col2im, conv2d_im2col, im2col

NAN = math.nan
FP8, INT8 = torch.float8_e4m3fn, torch.int8

X, BIAS = torch.ones(2, 3, 4, 5), torch.ones(3)
BIAS_RELU = {
    "x is a list": (([[1.0]], BIAS), TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ((None, BIAS), TypeError, "x must be a torch.Tensor, got NoneType"),
    "bias is a number": ((X, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
    "bias is None": ((X, None), TypeError, "bias must be a torch.Tensor, got NoneType"),
    "integers": ((X.int(), BIAS), TypeError, "x must be float32, .* or bfloat16, got int32"),
    "float64": ((X.double(), BIAS), TypeError, "x must be float32.*, got float64"),
    "dtypes differ": ((X, BIAS.half()), TypeError, r"bias .* x \(float32\), got float16"),
    "devices differ": ((X, BIAS.to("meta")), TypeError, "bias must be on .* like x, got meta"),
    "sparse": ((X.to_sparse(), BIAS), TypeError, "x must be .*strided.*got torch.sparse_coo"),
    "a vector": ((BIAS, BIAS), ValueError, r"x must have 2, 3 or 4 dimensions, got \[3\]"),
    "a number": ((X.sum(), BIAS), ValueError, r"x must have 2, 3 or 4 dimensions, got \[\]"),
    "5 dimensions": ((X[None], BIAS), ValueError, r"x must have .*, got \[1, 2, 3, 4, 5\]"),
    "bias too short": ((X, BIAS[1:]), ValueError, r"bias .* shape \[C\] with C=3, got \[2\]"),
    "bias too long": ((X, X[0, 0, 0]), ValueError, r"bias .* shape \[C\] with C=3, got \[5\]"),
    "bias a column": ((X, BIAS[:, None]), ValueError, r"bias .* with C=3, got \[3, 1\]"),
}

A, B, BIAS = torch.ones(3, 4), torch.ones(4, 5), torch.ones(5)
MATMUL = {
    "a is a list": (([[1.0]], B), TypeError, "a must be a torch.Tensor, got list"),
    "b is a number": ((A, 2.0), TypeError, "b must be a torch.Tensor, got float"),
    "b is None": ((A, None), TypeError, "b must be a torch.Tensor, got None"),
    "bias is a list": ((A, B, [0.0] * 5), TypeError, "bias must be a torch.Tensor, got list"),
    "integers": (
        (A.long(), B.long()),
        TypeError,
        "a must be float32, float16 or bfloat16, got int64",
    ),
    "float64": ((A.double(), B.double()), TypeError, "a must be .*, got float64"),
    "complex": ((A, B.to(torch.complex64)), TypeError, "b must be .*, got complex64"),
    "dtypes differ": ((A, B.half()), TypeError, r"b must have .* a \(float32\), got float16"),
    "bias dtype": ((A, B, BIAS.bfloat16()), TypeError, "bias must have .* got bfloat16"),
    "sparse": ((A.to_sparse(), B), TypeError, r"a must be .*strided.*, got torch.sparse_coo"),
    "devices differ": ((A, B.to("meta")), TypeError, "b must be on .* like a, got meta"),
    "a vector": ((A[0], B), ValueError, r"a must have shape \[M, K\], got \[4\]"),
    "a batch": ((A[None], B), ValueError, r"a must have shape \[M, K\], got \[1, 3, 4\]"),
    "b vector": ((A, B[:, 0]), ValueError, r"b must have shape \[K, N\] with K=4, got \[4\]"),
    "K differs": ((A, B[1:]), ValueError, r"b must have shape \[K, N\] with K=4, got \[3, 5\]"),
    "bias too short": ((A, B, BIAS[1:]), ValueError, r"bias must .* \[N\] with N=5, got \[4\]"),
    "bias a row": ((A, B, BIAS[None]), ValueError, r"bias must .* with N=5, got \[1, 5\]"),
    "bias a number": ((A, B, BIAS[0]), ValueError, r"bias must .* with N=5, got \[\]"),
    "activation": ((A, B, None, "swish"), ValueError, "activation must be .*'relu'.*got 'swish'"),
    "activation is a bool": ((A, B, None, True), ValueError, "activation must .* got True"),
    "activation is a function": ((A, B, None, torch.relu), ValueError, "activation must .* got <"),
}

X, W, B = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 2), torch.ones(6)
CONV2D = {
    "x is a list": (([[1.0]], W), TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ((None, W), TypeError, "x must be a torch.Tensor, got NoneType"),
    "weight is a number": ((X, 2.0), TypeError, "weight must be a torch.Tensor, got float"),
    "weight is None": ((X, None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    "bias is a list": ((X, W, [0.0] * 6), TypeError, "bias must be a torch.Tensor, got list"),
    "integers": (
        (X.int(), W.int()),
        TypeError,
        "x must be float32, float16 or bfloat16, got int32",
    ),
    "float64": ((X.double(), W.double()), TypeError, "x must be .*, got float64"),
    "complex": ((X, W.to(torch.complex64)), TypeError, "weight must be .*, got complex64"),
    "dtypes differ": ((X, W.half()), TypeError, r"weight .* x \(float32\), got float16"),
    "bias dtype": ((X, W, B.bfloat16()), TypeError, r"bias .* x \(float32\), got bfloat16"),
    "sparse": ((X.to_sparse(), W), TypeError, "x must be .*strided.*, got torch.sparse_coo"),
    "devices differ": ((X, W.to("meta")), TypeError, "weight must be on .* like x, got meta"),
    "bias elsewhere": ((X, W, B.to("meta")), TypeError, "bias must be on .* like x, got meta"),
    "x without batch": ((X[0], W), ValueError, r"x must .*\[N, C, H, W\], got \[4, 5, 6\]"),
    "x of 5 dimensions": ((X[None], W), ValueError, r"x must .*, got \[1, 2, 4, 5, 6\]"),
    "weight of 3": ((X, W[0]), ValueError, r"weight .*\[K, C/groups, R, S\], got \[4, 3, 2\]"),
    "channels differ": ((X, W[:, 1:]), ValueError, r"weight .* x \[2, 4, .*, got \[6, 3, 3, 2\]"),
    "groups=0": ((X, W, B, 1, 0, 1, 0), ValueError, "groups .* 4 channels .*, got 0"),
    "groups=-1": ((X, W, B, 1, 0, 1, -1), ValueError, "groups .* 4 channels .*, got -1"),
    "groups not of C": ((X, W, B, 1, 0, 1, 3), ValueError, "groups .* 4 channels .*, got 3"),
    "groups not of K": ((X, W[1:, :1], None, 1, 0, 1, 4), ValueError, r"weight .* got \[5, 1, 3"),
    "groups, whole weight": ((X, W, B, 1, 0, 1, 2), ValueError, r"weight .*groups=2.*\[6, 4, 3, 2"),
    "groups=2.0": ((X, W, B, 1, 0, 1, 2.0), TypeError, "groups must be an int, got 2.0"),
    "groups=True": ((X, W, B, 1, 0, 1, True), TypeError, "groups must be an int, got True"),
    "bias too short": ((X, W, B[1:]), ValueError, r"bias .*\[K\] with K=6, got \[5\]"),
    "bias a column": ((X, W, B[:, None]), ValueError, r"bias .* with K=6, got \[6, 1\]"),
    "stride=0": ((X, W, B, 0), ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "stride=(1, 0)": ((X, W, B, (1, 0)), ValueError, r"stride must be .* 1, got \(1, 0\)"),
    "stride=1.5": ((X, W, B, 1.5), TypeError, "stride must be an int or a pair .*, got 1.5"),
    "stride=None": ((X, W, B, None), TypeError, "stride must be an int or .*, got None"),
    "stride=True": ((X, W, B, True), TypeError, "stride must be an int or .*, got True"),
    "stride of 3": ((X, W, B, (1, 1, 1)), TypeError, r"stride must .*, got \(1, 1, 1\)"),
    "stride (1, 1.0)": ((X, W, B, (1, 1.0)), TypeError, r"stride must .*, got \(1, 1.0\)"),
    "padding=-1": ((X, W, B, 1, -1), ValueError, r"padding must be at least 0, got \(-1, -1\)"),
    "padding='same'": ((X, W, B, 1, "same"), TypeError, "padding must be an int .*, got 'same'"),
    "padding of 4": ((X, W, B, 1, (1, 1, 1, 1)), TypeError, r"padding .*, got \(1, 1, 1, 1\)"),
    "dilation=0": ((X, W, B, 1, 0, 0), ValueError, r"dilation must be at least 1, got \(0, 0\)"),
    "dilation='2'": ((X, W, B, 1, 0, "2"), TypeError, "dilation must be an int .*, got '2'"),
    "filter too high": ((X[:, :, :2], W), ValueError, "weight .*height is 3 taps .* 2 pixels"),
    "filter too wide": ((X, W, B, 1, 0, (1, 6)), ValueError, "weight .*width .* dilation 6"),
    "an empty filter": ((X, W[:, :, :0]), ValueError, "weight must have .*one tap.* 0 taps"),
    "an empty image": ((X[..., :0], W), ValueError, "weight .* fit .* 0 pixels"),
    "activation": (
        (X, W, B, 1, 0, 1, 1, "swish"),
        ValueError,
        "activation must be .*'relu'.*got 'swish'",
    ),
    "activation=True": ((X, W, B, 1, 0, 1, 1, True), ValueError, "activation .* got True"),
}

X, W, B, COLUMNS = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 2), torch.ones(6), torch.ones(30, 24)
SIZE = (2, 4, 5, 6)
COLUMNS_OF = {
    "x is a list": (im2col, ([[1.0]], 2), TypeError, "x must be a torch.Tensor, got list"),
    "integers": (im2col, (X.int(), 2), TypeError, "x must be float32.*, got int32"),
    "float64": (im2col, (X.double(), 2), TypeError, "x must be float32.*, got float64"),
    "sparse": (im2col, (X.to_sparse(), 2), TypeError, "x must be .*strided.*got torch.sparse"),
    "x without batch": (im2col, (X[0], 2), ValueError, r"x must .*H, W\], got \[4, 5, 6\]"),
    "kernel_size=0": (im2col, (X, 0), ValueError, r"kernel_size must be .* 1, got \(0, 0\)"),
    "kernel_size=2.0": (im2col, (X, 2.0), TypeError, "kernel_size must be an int .*, got 2.0"),
    "kernel_size=None": (im2col, (X, None), TypeError, "kernel_size must be .*, got None"),
    "kernel of 3": (im2col, (X, (1, 2, 3)), TypeError, r"kernel_size .*, got \(1, 2, 3\)"),
    "too high": (im2col, (X, (6, 1)), ValueError, "kernel_size .* height is 6 taps .* 5 pixels"),
    "too wide": (im2col, (X, 2, 1, 0, (1, 6)), ValueError, "kernel_size .* width .* dilation 6"),
    "stride=0": (im2col, (X, 2, 0), ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "padding=-1": (im2col, (X, 2, 1, -1), ValueError, r"padding must be .* 0, got \(-1, -1\)"),
    "dilation='1'": (im2col, (X, 2, 1, 0, "1"), TypeError, "dilation must be .*, got '1'"),
    "groups=3": (im2col, (X, 2, 1, 0, 1, 3), ValueError, "groups must .* 4 channels .*, got 3"),
    "groups=0": (im2col, (X, 2, 1, 0, 1, 0), ValueError, "groups must .* 4 channels .*, got 0"),
    "groups=2.0": (im2col, (X, 2, 1, 0, 1, 2.0), TypeError, "groups must be an int, got 2.0"),
    "columns is None": (col2im, (None, SIZE, (3, 2)), TypeError, "columns must be .*got NoneType"),
    "columns of int": (col2im, (COLUMNS.int(), SIZE, (3, 2)), TypeError, "columns .* got int32"),
    "columns of 3": (col2im, (COLUMNS[None], SIZE, (3, 2)), ValueError, r"columns .*\[1, 30, 24\]"),
    "a row less": (col2im, (COLUMNS[1:], SIZE, (3, 2)), ValueError, r"columns .*30.*\[29, 24\]"),
    "a column less": (col2im, (COLUMNS[:, 1:], SIZE, (3, 2)), ValueError, r"columns .*\[30, 23\]"),
    "size of 3": (col2im, (COLUMNS, (4, 5, 6), (3, 2)), ValueError, r"size .*, got \(4, 5, 6\)"),
    "size is negative": (col2im, (COLUMNS, (-2, 4, 5, 6), (3, 2)), ValueError, "size .*, got .-2"),
    "size is an int": (col2im, (COLUMNS, 5, (3, 2)), TypeError, "size must be .*, got 5"),
    "size of floats": (col2im, (COLUMNS, (2, 4, 5.0, 6), (3, 2)), TypeError, "size .*, got .*5.0"),
    "size is None": (col2im, (COLUMNS, None, (3, 2)), TypeError, "size must be .*, got None"),
    "size too small": (col2im, (COLUMNS, SIZE, (6, 2)), ValueError, "kernel_size .* 6 taps"),
    "col2im groups": (col2im, (COLUMNS, SIZE, (3, 2), 1, 0, 1, 3), ValueError, "groups .* got 3"),
    "conv: weight": (conv2d_im2col, (X, None), TypeError, "weight must be .*, got NoneType"),
    "conv: channels": (conv2d_im2col, (X, W[:, 1:]), ValueError, r"weight .*\[6, 3, 3, 2\]"),
    "conv: bias": (conv2d_im2col, (X, W, B[1:]), ValueError, r"bias .* K=6, got \[5\]"),
    "conv: dtypes": (conv2d_im2col, (X, W.half()), TypeError, "weight .* got float16"),
    "conv: activation": (conv2d_im2col, (X, W, B, 1, 0, 1, 1, "x"), ValueError, "activation .*'x'"),
}

X, W, B = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 2), torch.ones(6)
CONV2D_RELU_POOL = {
    "x is a list": (([[1.0]], W), TypeError, "x must be a torch.Tensor, got list"),
    "weight is None": ((X, None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    "bias is a number": ((X, W, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
    "integers": ((X.int(), W.int()), TypeError, "x must be float32, .*, got int32"),
    "float64": ((X.double(), W.double()), TypeError, "x must be .*, got float64"),
    "dtypes differ": ((X, W.half()), TypeError, r"weight .* x \(float32\), got float16"),
    "bias dtype": ((X, W, B.bfloat16()), TypeError, r"bias .* x \(float32\), got bfloat16"),
    "sparse": ((X.to_sparse(), W), TypeError, "x must be .*strided.*, got torch.sparse_coo"),
    "devices differ": ((X, W.to("meta")), TypeError, "weight must be on .* like x, got meta"),
    "x without batch": ((X[0], W), ValueError, r"x must .*\[N, C, H, W\], got \[4, 5, 6\]"),
    "weight of 3": ((X, W[0]), ValueError, r"weight .*, R, S\], got \[4, 3, 2\]"),
    "channels differ": ((X, W[:, 1:]), ValueError, r"weight .* x \[2, 4, .*, got \[6, 3, 3, 2\]"),
    "bias too short": ((X, W, B[1:]), ValueError, r"bias .*\[K\] with K=6, got \[5\]"),
    "bias a column": ((X, W, B[:, None]), ValueError, r"bias .* with K=6, got \[6, 1\]"),
    "padding=-1": ((X, W, B, -1), ValueError, r"padding must be at least 0, got \(-1, -1\)"),
    "padding=0.5": ((X, W, B, 0.5), TypeError, "padding must be an int .*, got 0.5"),
    "padding='same'": ((X, W, B, "same"), TypeError, "padding must be an int .*, got 'same'"),
    "padding of 3": ((X, W, B, (1, 1, 1)), TypeError, r"padding must .*, got \(1, 1, 1\)"),
    "padding=None": ((X, W, B, None), TypeError, "padding must be .*, got None"),
    "filter too high": ((X[:, :, :2], W), ValueError, "weight .*height is 3 taps .* 2 pixels"),
    "an empty filter": ((X, W[:, :, :0]), ValueError, "weight must have .* 0 taps"),
    "one row to pool": ((X[:, :, :3], W), ValueError, r"x must .* 2x2 .*got \[2, 4, 3, 6\]"),
    "one column to pool": ((X[..., :2], W), ValueError, r"x must .* 2x2 .*got \[2, 4, 5, 2\]"),
}

NEITHER = "a must be float8_e4m3fn or int8, got"
A, B = (torch.ones(s).to(INT8) for s in ((3, 4), (4, 5)))
S, ROWS, COLUMNS, BIAS = torch.ones(()), torch.ones(3), torch.ones(5), torch.ones(5).bfloat16()
SCALED_MATMUL = {
    "a is a list": (([[1]], B, S, S), TypeError, "a must be a torch.Tensor, got list"),
    "b is None": ((A, None, S, S), TypeError, "b must be a torch.Tensor, got None"),
    "scale_a is a number": ((A, B, 1.0, S), TypeError, "scale_a must be a torch.Tensor, got float"),
    "scale_b is None": ((A, B, S, None), TypeError, "scale_b must be a torch.Tensor, got NoneType"),
    "float16": (
        (A.half(), B.half(), S, S),
        TypeError,
        f"{NEITHER} float16",
    ),
    "uint8": ((A.byte(), B.byte(), S, S), TypeError, f"{NEITHER} uint8"),
    "float8_e5m2": (
        (A, B.to(torch.float8_e5m2), S, S),
        TypeError,
        "b must be float8_e4m3fn or int8, got float8_e5m2",
    ),
    "dtypes differ": (
        (A, B.to(FP8), S, S),
        TypeError,
        r"b must have .* a \(int8\), got float8_e4m3fn",
    ),
    "scale dtype": ((A, B, S.double(), S), TypeError, "scale_a must be float32, got float64"),
    "bias dtype": ((A, B, S, S, BIAS.float()), TypeError, "bias must be bfloat16, got float32"),
    "bias dtype, float32": (
        (A, B, S, S, BIAS, None, torch.float32),
        TypeError,
        "bias must be float32, got bfloat16",
    ),
    "dtype": (
        (A, B, S, S, None, None, torch.int32),
        TypeError,
        "dtype must be float32, float16 or bfloat16, got torch.int32",
    ),
    "dtype is a string": (
        (A, B, S, S, None, None, "float32"),
        TypeError,
        "dtype .* got float32",
    ),
    "b elsewhere": ((A, B.to("meta"), S, S), TypeError, "b must be on .* like a, got meta"),
    "a scale elsewhere": (
        (A, B, S.to("meta"), S.to("meta")),
        TypeError,
        "scale_a must be on .* like a, got meta",
    ),
    "the bias elsewhere": ((A, B, S, S, BIAS.to("meta")), TypeError, "bias must be on .* got meta"),
    "a vector": ((A[0], B, S, S), ValueError, r"a must have shape \[M, K\], got \[4\]"),
    "a batch": ((A[None], B, S, S), ValueError, r"a must .* \[M, K\], got \[1, 3, 4\]"),
    "K differs": ((A, B[1:], S, S), ValueError, r"b must .* \[K, N\] with K=4, got \[3, 5\]"),
    "too many rows": (
        (A, B, COLUMNS, S),
        ValueError,
        r"scale_a must have shape \[\], \[M\] or \[M, 1\] with M=3, got \[5\]",
    ),
    "scale_a lies": ((A, B, ROWS[None], S), ValueError, r"scale_a must .* M=3.*, got \[1, 3\]"),
    "scale_a has three dimensions": (
        (A, B, ROWS[:, None, None], S),
        ValueError,
        r"scale_a must .* got \[3, 1, 1\]",
    ),
    "too few columns": (
        (A, B, S, ROWS),
        ValueError,
        r"scale_b must have shape \[\], \[N\] or \[1, N\] with N=5, got \[3\]",
    ),
    "scale_b stands": ((A, B, S, COLUMNS[:, None]), ValueError, r"scale_b .* N=5.*, got \[5, 1\]"),
    "bias too short": ((A, B, S, S, BIAS[1:]), ValueError, r"bias must .* with N=5, got \[4\]"),
    "activation": (
        (A, B, S, S, None, "swish"),
        ValueError,
        "activation must be .*got 'swish'",
    ),
}

X = torch.ones(2, 3)
SOFTMAX = {
    "x is a list": (([[1.0]],), TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ((None,), TypeError, "x must be a torch.Tensor, got NoneType"),
    "integers": ((X.long(),), TypeError, "x must be float32, float16 or bfloat16, got int64"),
    "booleans": ((X.bool(),), TypeError, "x must be .*, got bool"),
    "float64": ((X.double(),), TypeError, "x must be .*, got float64"),
    "complex": ((X.to(torch.complex64),), TypeError, "x must be .*, got complex64"),
    "sparse": ((X.to_sparse(),), TypeError, "x must be .*strided.*, got torch.sparse_coo"),
    "dim too large": ((X, 2), ValueError, r"dim .* between -2 and 1 for x \[2, 3\], got 2"),
    "dim too small": ((X, -3), ValueError, r"dim .* between -2 and 1 for x \[2, 3\], got -3"),
    "dim of a vector": ((X[0], 1), ValueError, r"dim .* between -1 and 0 for x \[3\], got 1"),
    "dim of a number": ((X[0, 0], 1), ValueError, r"dim .* between -1 and 0 for x \[\], got 1"),
    "dim of rank 5": ((X[None, None, None], 5), ValueError, "dim .* between -5 and 4 .* got 5"),
    "dim is None": ((X, None), TypeError, "dim must be an int, got None"),
    "dim is a float": ((X, 1.0), TypeError, "dim must be an int, got 1.0"),
    "dim is a bool": ((X, True), TypeError, "dim must be an int, got True"),
    "dim is a pair": ((X, (0, 1)), TypeError, r"dim must be an int, got \(0, 1\)"),
    "dim is a name": ((X, "C"), TypeError, "dim must be an int, got 'C'"),
}

X, T = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
X4, T3 = torch.ones(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
CROSS_ENTROPY = {
    "logits are a list": (([[1.0]], T), {}, TypeError, "logits must be a torch.Tensor, got list"),
    "logits are None": ((None, T), {}, TypeError, "logits must be a torch.Tensor, got NoneType"),
    "integer logits": ((X.long(), T), {}, TypeError, "logits must be float32.*, got int64"),
    "float64 logits": ((X.double(), T), {}, TypeError, "logits must be .*, got float64"),
    "sparse logits": ((X.to_sparse(), T), {}, TypeError, "logits must be .*strided.*sparse"),
    "target is a list": ((X, [0, 1]), {}, TypeError, "target must be a torch.Tensor, got list"),
    "target is an int": ((X[0], 1), {}, TypeError, "target must be a torch.Tensor, got int"),
    "probabilities": ((X, X), {}, TypeError, "target must be class .*int64 or int32, got float32"),
    "target is bytes": ((X, T.byte()), {}, TypeError, "target must be .*, got uint8"),
    "target is bool": ((X, T.bool()), {}, TypeError, "target must be .*, got bool"),
    "devices differ": ((X, T.to("meta")), {}, TypeError, "target must be on .* like logits.*meta"),
    "logits are a number": (
        (X[0, 0], T[0]), {}, ValueError, r"logits must have 1 to 4 dimensions, got \[\]"
    ),
    "5 dimensions": (
        (X4[None], T3[None]), {}, ValueError, r"logits must .*, got \[1, 2, 3, 4, 5\]"
    ),
    "too few classes": ((X, T[1:]), {}, ValueError, r"target must .* \[2\], got \[1\]"),
    "a column": ((X, T[:, None]), {}, ValueError, r"target must .* \[2\], got \[2, 1\]"),
    "a number": ((X, T[0]), {}, ValueError, r"target must .* \[2\], got \[\]"),
    "a row, not a batch": ((X[0], T), {}, ValueError, r"target must .* \[\], got \[2\]"),
    "classes last": (
        (X4.movedim(1, -1), T3), {}, ValueError, r"target must .* \[2, 5, 3\], got \[2, 4, 5\]"
    ),
    "flat": ((X4, T3.view(-1)), {}, ValueError, r"target must .* \[2, 4, 5\], got \[40\]"),
    "reduction": ((X, T), dict(reduction="avg"), ValueError, "reduction must .*'mean'.* got 'avg'"),
    "no reduction": ((X, T), dict(reduction=None), ValueError, "reduction must .* got None"),
    "smoothing above 1": (
        (X, T), dict(label_smoothing=1.5), ValueError, "label_smoothing .* 0 and 1, got 1.5"
    ),
    "smoothing below 0": (
        (X, T), dict(label_smoothing=-0.1), ValueError, "label_smoothing .* got -0.1"
    ),
    "smoothing NaN": ((X, T), dict(label_smoothing=NAN), ValueError, "label_smoothing .* got nan"),
    "smoothing a string": (
        (X, T), dict(label_smoothing="0.1"), TypeError, "label_smoothing must be a float, got '0.1'"
    ),
    "smoothing a bool": (
        (X, T), dict(label_smoothing=True), TypeError, "label_smoothing must be a float, got True"
    ),
    "ignore_index a float": (
        (X, T), dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got 1.0"
    ),
    "ignore_index None": (
        (X, T), dict(ignore_index=None), TypeError, "ignore_index must be an int, got None"
    ),
}  # fmt: skip

X = torch.ones(2, 3, 4, 5)
MAX_POOL2D = {
    "x is a list": (([[1.0]], 2), TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ((None, 2), TypeError, "x must be a torch.Tensor, got NoneType"),
    "integers": ((X.int(), 2), TypeError, "x must be float32, .* or bfloat16, got int32"),
    "float64": ((X.double(), 2), TypeError, "x must be float32.*, got float64"),
    "complex": ((X.cfloat(), 2), TypeError, "x must be float32.*, got complex64"),
    "sparse": ((X.to_sparse(), 2), TypeError, "x must be .*strided.*got torch.sparse_coo"),
    "a matrix": ((X[0, 0], 2), ValueError, r"x .* \[N, C, H, W\] or \[C, H, W\], got \[4, 5\]"),
    "5 dimensions": ((X[None], 2), ValueError, r"x .*\[C, H, W\], got \[1, 2, 3, 4, 5\]"),
    "no pixels": ((X[..., :0], 2, 1, 1), ValueError, r"x must have room .* \[2, 3, 4, 0\]"),
    "window too high": ((X, (5, 1)), ValueError, r"room .* \(5, 1\) .* \(0, 0\), got \[2, 3, 4, 5"),
    "window too wide": ((X, 8, 1, 1), ValueError, r"x must have room .* kernel_size \(8, 8\)"),
    "window of 0": ((X, 0), ValueError, r"kernel_size must be at least 1, got \(0, 0\)"),
    "window of floats": ((X, 2.0), TypeError, "kernel_size must be an int or a pair .* got 2.0"),
    "window of three": ((X, (2, 2, 2)), TypeError, "kernel_size must be .* a pair of ints"),
    "window is True": ((X, True), TypeError, "kernel_size must be an int .* got True"),
    "window is None": ((X, None), TypeError, "kernel_size must be an int .* got None"),
    "stride of 0": ((X, 2, 0), ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "stride negative": ((X, 2, (1, -1)), ValueError, r"stride must be at least 1, got \(1, -1\)"),
    "stride of text": ((X, 2, "same"), TypeError, "stride must be an int or a pair"),
    "padding negative": ((X, 2, 2, -1), ValueError, r"padding must be at least 0, got \(-1, -1\)"),
    "padding too large": ((X, 3, 1, 2), ValueError, r"padding .* half .* \(3, 3\), got \(2, 2\)"),
    "padding wider": ((X, 4, 1, (1, 3)), ValueError, r"padding must be at most half of"),
    "padding is None": ((X, 2, 2, None), TypeError, "padding must be an int or a pair"),
    "a plane of 2^31": (
        (X[:1, :1, :1, :1].expand(1, 1, 2**16, 2**15), 2), ValueError, r"x .* fewer than 2\^31",
    ),
}  # fmt: skip

IM2COL, COL2IM, CONV2D_IM2COL = (
    {reason: case[1:] for reason, case in COLUMNS_OF.items() if case[0] is fn}
    for fn in (im2col, col2im, conv2d_im2col)
)

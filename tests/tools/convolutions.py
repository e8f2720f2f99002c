"""The convolutions that the tests of conv2d, its gradients and im2col try, each for a reason."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch

from tests.tools.inputs import DEVICE, laid_out, randn


@dataclass(frozen=True)
class Conv:
    """One convolution: `x` is [N, C, H, W], `taps` is [R, S], `filters` is K."""

    x: tuple[int, int, int, int]
    filters: int
    taps: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    @property
    def args(self):
        """(stride, padding, dilation, groups), as the public functions take them."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def lists(self):
        """The same as the custom ops take them: pairs."""
        pairs = (list(v) if isinstance(v, tuple) else [v, v] for v in self.args[:3])
        return *pairs, self.groups

    @property
    def weight(self):
        """The shape [K, C/groups, R, S]."""
        return self.filters, self.x[1] // self.groups, *self.taps

    @property
    def y(self):
        """The shape [N, K, P, Q]."""
        x, w = (torch.empty(shape, device="meta") for shape in (self.x, self.weight))
        return tuple(torch.nn.functional.conv2d(x, w, None, *self.args).shape)

    @property
    def terms(self):
        """Of how many products one element of y, dx, dweight and dbias is a sum."""
        N, K, P, Q = self.y
        _, C, R, S = self.weight
        return dict(y=C * R * S + 1, dx=K // self.groups * R * S, dw=N * P * Q, db=N * P * Q)

    def inputs(self, dtype, x="contiguous", weight="contiguous", values=randn):
        """x and weight in these layouts."""
        return [
            laid_out(values(*self.x, dtype=dtype), x),
            laid_out(values(*self.weight, dtype=dtype, seed=1), weight),
        ]

    def dy(self, dtype, layout="contiguous", values=randn):
        """A gradient of the output."""
        return laid_out(values(*self.y, dtype=dtype, seed=3), layout)


def integers(*shape, dtype=torch.float32, seed=0, low=-2, high=2):
    """Small integers: every product and sum of them is exact, whatever its order."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    x = torch.randint(low, high + 1, shape, generator=generator)
    return x.to(device=DEVICE, dtype=dtype)


CONVS = {
    # sizes
    "all of size 1": Conv((1, 1, 1, 1), 1, (1, 1)),
    "1x1": Conv((2, 20, 5, 7), 18, (1, 1)),
    "one image row": Conv((2, 3, 1, 9), 4, (1, 3), padding=(0, 1)),
    "one image column": Conv((2, 3, 9, 1), 4, (3, 1)),
    "3x3 without padding": Conv((2, 5, 8, 9), 6, (3, 3)),
    "3x3 of the same size": Conv((2, 5, 8, 9), 6, (3, 3), padding=1),
    "filter as large as x": Conv((3, 4, 5, 6), 5, (5, 6)),
    "filter larger than x": Conv((2, 3, 2, 3), 4, (5, 4), padding=2),
    "a batch of single outputs": Conv((17, 2, 3, 3), 3, (3, 3)),
    # channels: below 16 taps and channels are one sum, from 16 on a step is one tap
    "C=1": Conv((2, 1, 9, 8), 5, (3, 3), padding=1),
    "K=1": Conv((2, 5, 9, 8), 1, (3, 3), padding=1),
    "K=1 of many channels": Conv((2, 20, 6, 5), 1, (3, 3), padding=1),
    "C=15, the last of one sum": Conv((1, 15, 6, 7), 7, (3, 3), padding=1),
    "C=16, exactly one block": Conv((1, 16, 6, 7), 17, (3, 3), padding=1),
    "C=17, one more than a block": Conv((1, 17, 6, 7), 16, (3, 3), padding=1),
    "C=32, no padding: nothing is masked": Conv((2, 32, 6, 6), 32, (2, 2)),
    "C=32, padding along one side alone": Conv((1, 32, 4, 5), 16, (1, 3), padding=(0, 1)),
    "C=130, a second step of channels": Conv((1, 130, 4, 5), 6, (2, 2), padding=1),
    "K=130, the same for the input gradient": Conv((1, 6, 4, 5), 130, (2, 2), padding=1),
    # filters
    "2x5": Conv((2, 4, 7, 9), 5, (2, 5)),
    "5x2": Conv((2, 4, 9, 7), 5, (5, 2), padding=(2, 1)),
    "1x7, 18 channels": Conv((1, 18, 5, 9), 6, (1, 7), padding=(0, 3)),
    "7x1, 18 channels": Conv((1, 18, 9, 5), 6, (7, 1), padding=(3, 0)),
    "4x4, of even size": Conv((2, 3, 7, 8), 4, (4, 4), padding=2),
    # strides
    "stride 2, an odd image": Conv((2, 4, 9, 11), 5, (3, 3), 2, 1),
    "stride 2 that leaves a row and a column unread": Conv((2, 4, 8, 10), 5, (3, 3), 2),
    "stride 3 that leaves two of them unread": Conv((2, 18, 8, 11), 5, (3, 3), 3),
    "stride 2 of 1x1: a shortcut": Conv((2, 18, 7, 6), 9, (1, 1), 2),
    "stride 3 of 2x2: unread pixels between windows": Conv((2, 3, 9, 8), 4, (2, 2), 3),
    "stride 5 of 3x1, 20 channels": Conv((1, 20, 13, 12), 6, (3, 1), (5, 2)),
    "stride larger than x": Conv((2, 3, 4, 5), 4, (2, 2), (5, 1)),
    "stride (1, 3)": Conv((2, 4, 6, 11), 5, (3, 3), (1, 3), 1),
    "stride (3, 2), 17 channels": Conv((1, 17, 11, 8), 5, (3, 3), (3, 2), (1, 2)),
    "the first layer of a ResNet, small": Conv((1, 3, 19, 18), 8, (7, 7), 2, 3),
    # padding
    "padding of 1x1: a frame": Conv((1, 3, 4, 5), 4, (1, 1), padding=1),
    "padding larger than needed": Conv((1, 3, 4, 5), 4, (3, 3), padding=4),
    "padding larger than x, stride 2": Conv((1, 18, 2, 3), 4, (3, 3), 2, 5),
    "padding (2, 0)": Conv((2, 3, 6, 7), 4, (3, 3), padding=(2, 0)),
    "padding (0, 2)": Conv((2, 18, 6, 7), 4, (3, 3), padding=(0, 2)),
    # dilation
    "dilation 2": Conv((1, 4, 9, 10), 5, (3, 3), padding=2, dilation=2),
    "dilation (1, 3)": Conv((1, 18, 7, 9), 5, (3, 3), padding=(1, 0), dilation=(1, 3)),
    "dilation of 1x1 does nothing": Conv((2, 4, 5, 6), 5, (1, 1), dilation=3),
    "dilation 2, stride 3": Conv((1, 4, 11, 13), 5, (3, 3), 3, 2, 2),
    "dilation 3, stride 2": Conv((1, 18, 11, 12), 5, (3, 3), 2, 1, 3),
    "dilation 2, stride 2: every second class has no tap": Conv((2, 4, 9, 10), 5, (3, 3), 2, 1, 2),
    "dilation 4, stride 6: gcd 2": Conv((1, 4, 15, 7), 5, (4, 3), (6, 1), 3, (4, 1)),
    "dilation 6, stride 4: gcd 2": Conv((1, 4, 7, 17), 5, (2, 3), (1, 4), (1, 2), (1, 6)),
    "dilation (2, 3), stride (4, 3)": Conv((1, 18, 13, 14), 5, (4, 3), (4, 3), (1, 2), (2, 3)),
    # groups
    "2 groups": Conv((2, 6, 7, 6), 8, (3, 3), padding=1, groups=2),
    "3 groups of 17 channels": Conv((1, 51, 5, 6), 9, (3, 2), padding=1, groups=3),
    "2 groups of 17 filters": Conv((1, 4, 5, 6), 34, (3, 2), padding=1, groups=2),
    "one filter a group": Conv((2, 12, 6, 5), 3, (3, 3), groups=3),
    "depthwise": Conv((2, 5, 8, 6), 5, (3, 3), padding=1, groups=5),
    "depthwise, two filters a channel": Conv((2, 3, 8, 6), 6, (3, 3), (2, 1), 1, groups=3),
    "depthwise, stride and dilation": Conv((1, 4, 11, 9), 4, (3, 3), (1, 2), 2, 2, groups=4),
    "everything at once": Conv((2, 34, 12, 11), 6, (4, 3), (3, 2), (3, 1), (2, 4), 2),
}
# What also runs with the oldest versions: each kernel, each mask and each kind of geometry once.
CORE = [
    "all of size 1",
    "3x3 of the same size",
    "C=17, one more than a block",
    "C=130, a second step of channels",
    "5x2",
    "stride 2 that leaves a row and a column unread",
    "stride 5 of 3x1, 20 channels",
    "padding larger than needed",
    "dilation 6, stride 4: gcd 2",
    "depthwise, two filters a channel",
    "everything at once",
]
assert set(CORE) <= set(CONVS)

every_dtype = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.core), torch.float16, torch.bfloat16],
)

# One for the kernel of few channels and one for the other; stride, padding and R != S in both.
FEW = Conv((3, 5, 6, 7), 6, (3, 2), (2, 1), 1)
MANY = Conv((2, 18, 5, 6), 17, (2, 3), (1, 2), 1)
GROUPED = Conv((3, 36, 9, 8), 6, (2, 3), (2, 1), (0, 1), (1, 2), groups=2)
few_and_many = pytest.mark.parametrize(
    "conv", [FEW, MANY, GROUPED], ids=["few channels", "many channels", "groups"]
)


@st.composite
def any_conv(draw):
    """Any convolution that fits: few pixels and few classes of pixels, for the interpreter."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    C = draw(st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33]))
    K = draw(st.sampled_from([1, 2, 3, 16, 17, 20]))
    sides = []
    for stride in draw(st.permutations([draw(st.integers(1, 5)), draw(st.integers(1, 2))])):
        taps, pad = draw(st.integers(1, 5)), draw(st.integers(0, 4))
        dilation = draw(st.integers(1, 4))
        least = max(1, dilation * (taps - 1) + 1 - 2 * pad)
        sides.append((draw(st.integers(least, least + 9)), taps, stride, pad, dilation))
    size, taps, stride, padding, dilation = zip(*sides, strict=True)
    x = (draw(st.integers(1, 3)), C * groups, *size)
    return Conv(x, K * groups, taps, stride, padding, dilation, groups)


def far_apart(x, dim, path):
    """`x`, but with 3 * 2^30 elements from the first to the last along `dim`, in next to no memory.

    It lies in a sparse file, of which only the pages that are used exist. Before it come 2^31 more
    elements: that is where an offset that overflows ends up, and finds zeros.
    """
    extent = 3 * 2**30
    strides = list(x.stride())
    strides[dim] = -(-extent // (x.shape[dim] - 1))
    size = 2**31 + extent + 2**20
    with open(path, "wb") as file:
        file.truncate(size * x.element_size())
    buffer = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    path.unlink()  # it is gone when the tensor is
    return buffer.as_strided(x.shape, strides, 2**31).copy_(x)

"""Models: the demo's convolutional network in four forms that share a state_dict, MLP and VGG16.

The demo's network turns an image into one number for each class (a logit):

    image [N, C, H, W]                                        28 x 28 digits:   1 x 28 x 28
      conv 3x3, 16 filters, + bias + ReLU + 2x2 max-pool                       16 x 13 x 13
      conv 3x3, 32 filters, + bias + ReLU + 2x2 max-pool                       32 x  5 x  5
      flatten, linear                                                          10 logits

It has 12,810 parameters for 28 x 28 grey images and 10 classes: 160 + 4,640 + 8,010.

`build` knows these names:

    cnn           the demo's network; each of its two blocks is one fused kernel
    cnn-unfused   the same; convolution, bias + ReLU and max-pool are three kernels
    cnn-im2col    like cnn-unfused, but the convolution goes through an explicit im2col matrix
    cnn-torch     the same network made of torch.nn, to test against and to compare with
    mlp           two linear layers with 128 hidden units
    vgg16         the network of imagenet.py, for a GPU and images of at least 32 x 32; with 10
                  classes it has 34 million parameters at 32 x 32, and 134 million at 224 x 224

The same seed gives all four forms of the demo's network the same initial weights. A state_dict of
one form loads into any other. So a network trained here can be used where only PyTorch is
installed.

Images are channels_last from the input to the last convolution's output: in memory, the C channels
of a pixel lie side by side. The linear layer reads them in this order, so no layer converts what
another has written. tests/nets/test_layouts.py checks this.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .imagenet import VGG16
from .layers import Conv2dReluPool, FlattenLinear, Linear

MODELS = ("cnn", "cnn-unfused", "cnn-im2col", "cnn-torch", "mlp", "vgg16")


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Make a model with random initial weights.

    Args:
        name: one of MODELS.
        shape: (C, H, W) of one image.
        classes: the number of logits.

    Raises:
        ValueError: if the name is unknown, or images are too small for the network.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
    if name == "mlp":
        return MLP(shape, classes)
    if name == "vgg16":
        return VGG16(shape, classes)
    if name == "cnn-torch":
        return TorchCNN(shape, classes)
    how = {"cnn": "fused", "cnn-unfused": "separate", "cnn-im2col": "im2col"}[name]
    return CNN(shape, classes, how)


def _pooled_size(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return (H, W) of an image after the two blocks of the demo's network.

    A block takes 2 pixels off each dimension, then halves it, rounding down.

    Raises:
        ValueError: if nothing would be left.
    """
    height, width = (((size - 2) // 2 - 2) // 2 for size in shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"images must be at least 10 x 10 for this network, got {shape[1]} x {shape[2]}"
        )
    return height, width


class CNN(nn.Module):
    """The demo's network by our kernels: images [N, C, H, W] to logits [N, classes].

    Args:
        shape: (C, H, W) of one image; H and W are at least 10.
        classes: the number of logits.
        how: "fused", "separate" or "im2col"; see layers.Conv2dReluPool.
    """

    def __init__(self, shape, classes, how="fused"):
        super().__init__()
        height, width = _pooled_size(shape)
        self.conv1 = Conv2dReluPool(shape[0], 16, 3, how=how)
        self.conv2 = Conv2dReluPool(16, 32, 3, how=how)
        self.fc = FlattenLinear((32, height, width), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc(self.conv2(self.conv1(x)))


class TorchCNN(nn.Module):
    """CNN's twin, made of torch.nn. Both have the same parameters, order and initial weights."""

    def __init__(self, shape, classes):
        super().__init__()
        height, width = _pooled_size(shape)
        self.conv1 = nn.Conv2d(shape[0], 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.fc = nn.Linear(32 * height * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


class MLP(nn.Module):
    """Two linear layers, computed by our matmul: images [N, C, H, W] to logits [N, classes]."""

    def __init__(self, shape, classes, hidden=128):
        super().__init__()
        self.fc1 = FlattenLinear(shape, hidden, activation="relu")
        self.fc2 = Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc2(self.fc1(x))

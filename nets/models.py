"""Models: the demo's convolutional network in four forms that share a state_dict, MLP and VGG16.

    image [N, C, H, W]                                        28 x 28 digits:   1 x 28 x 28
      conv 3x3, 16 filters, + bias + ReLU + 2x2 max-pool                       16 x 13 x 13
      conv 3x3, 32 filters, + bias + ReLU + 2x2 max-pool                       32 x  5 x  5
      flatten, linear                                                          10 logits

12,810 parameters for 28 x 28 grey images and 10 classes: 160 + 4,640 + 8,010.

    cnn           each block is one fused kernel
    cnn-unfused   convolution, bias + ReLU and max-pool are three kernels
    cnn-im2col    the same, the convolution through an explicit im2col matrix
    cnn-torch     the same network of torch.nn: the twin to test against and to compare with
    mlp           two linear layers, 128 hidden units
    vgg16         of imagenet.py, for images of at least 32 x 32: 134 million parameters, for a GPU

The same seed gives all four forms the same initial weights, and a state_dict of one loads into any
other, so a network trained here can be used where only PyTorch is installed.

Images are channels_last from the input to the last convolution's output, and the linear layer reads
them so: no layer converts what another has written. tests/nets/test_layouts.py counts.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .imagenet import VGG16
from .layers import Conv2dReluPool, FlattenLinear, Linear

MODELS = ("cnn", "cnn-unfused", "cnn-im2col", "cnn-torch", "mlp", "vgg16")


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return a freshly initialised model.

    Args:
        name: one of MODELS.
        shape: one image's (C, H, W).
        classes: the number of logits.

    Raises:
        ValueError: for an unknown name, or images too small for the network.
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
    """Return (H, W) after two blocks, each of which loses 2 pixels and then halves, rounding down.

    Raises:
        ValueError: when nothing would be left.
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
        shape: one image's (C, H, W), H and W at least 10.
        classes: the number of logits.
        how: "fused", "separate" or "im2col"; see Conv2dReluPool.
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
    """The twin of CNN made of torch.nn: same parameters, same order, same initial weights."""

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
    """Two linear layers by our matmul: images [N, C, H, W] to logits [N, classes]."""

    def __init__(self, shape, classes, hidden=128):
        super().__init__()
        self.fc1 = FlattenLinear(shape, hidden, activation="relu")
        self.fc2 = Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc2(self.fc1(x))

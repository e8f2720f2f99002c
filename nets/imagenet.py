"""VGG16 and ResNet-50, made of the kernels: two large networks that many people know.

Their parameters have torchvision's names and shapes. So a state_dict of torchvision's VGG16 loads
as it is. One of its ResNet-50 loads after `fold` has moved the batch-norms into the convolutions:

    VGG16().load_state_dict(torchvision.models.vgg16(weights="DEFAULT").state_dict())
    ResNet50().load_state_dict(fold(torchvision.models.resnet50(weights="DEFAULT").state_dict()))

VGG16 has 13 convolutions of 3x3 in five stages, then three linear layers. All of it is ours:

    stage     1         2         3         4         5        conv: conv + bias + ReLU
    channels  64        128       256       512       512      last: conv + bias + ReLU + 2x2 pool
    layers    conv last conv last conv conv conv conv
                                  last      last ...           each is one kernel

In the backward pass the convolutions are one stack (kernels/conv2d_stack.py): a ReLU between two
convolutions needs no pass of its own.

ResNet-50 has a first convolution with a pool, 16 bottlenecks, a mean over all pixels and a linear
layer. A bottleneck adds its input, the shortcut, to its result. PyTorch computes this sum and the
ReLU after it, in place.

    x ---+---> 1x1, ReLU ---> 3x3, ReLU ---> 1x1 ---> + ---> ReLU --->
         |                                            |
         +--------- (1x1, where shapes differ) -------+

Images are channels_last from the input to the logits (layers.py explains the layout). No layer
converts what another has written. tests/nets/test_layouts.py checks this.

Speed limits for a 224 x 224 image: VGG16 needs 30.9 GFLOPs and ResNet-50 needs 8.2 GFLOPs. The
tensor cores limit most of VGG16, and the memory limits the early stages of ResNet-50. The comments
above the two classes count why.

Sources: Simonyan and Zisserman, Very Deep Convolutional Networks (2014), configuration D; He et
al., Deep Residual Learning (2015), with the stride in the 3x3 convolution, as in torchvision.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .layers import Conv2d, Conv2dReluPool, ConvStack, FlattenLinear, Linear, MaxPool2d

# Each stage of VGG16: its channels as a multiple of the first stage's, and its convolutions.
STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))


def vgg16_features(channels=3, width=64) -> ConvStack:
    """Make VGG16's 13 convolutions: [N, channels, H, W] to [N, 8 * width, H // 32, W // 32]."""
    # `place` is the number in torchvision's list, where each ReLU and each pool has its own number.
    features, place = OrderedDict(), 0
    for factor, layers in STAGES:
        for last in [False] * (layers - 1) + [True]:
            out = factor * width
            features[str(place)] = (
                Conv2dReluPool(channels, out, 3, padding=1)
                if last
                else Conv2d(channels, out, 3, padding=1, activation="relu")
            )
            channels, place = out, place + (3 if last else 2)
    return ConvStack(features)


def torch_vgg16_features(channels=3, width=64) -> nn.Sequential:
    """Make the same from torch.nn, as torchvision does. It loads the same state_dict."""
    features = nn.Sequential()
    for factor, layers in STAGES:
        for _ in range(layers):
            features.append(nn.Conv2d(channels, factor * width, 3, padding=1))
            features.append(nn.ReLU(inplace=True))
            channels = factor * width
        features.append(nn.MaxPool2d(2))
    return features.to(memory_format=torch.channels_last)


# What limits VGG16, for 224 x 224 images in 16 bits:
#
# - An image needs 30.9 GFLOPs. 30.5 of them are in 3x3 convolutions with 64 input channels or more.
#   These do hundreds of FLOPs for each byte that they move, so the tensor cores limit them.
# - The first linear layer has 25,088 * 4,096 = 103 million of the 138 million parameters: 206 MB.
#   They are read once for a batch of any size. So the memory limits this layer in small batches.
class VGG16(nn.Module):
    """VGG16: images [N, C, H, W] to logits [N, classes].

    It differs from torchvision's network in two points. There is no dropout. And torchvision
    averages the last image to 7 x 7 pixels, which changes nothing if the input is 224 x 224. Here
    the first linear layer takes the size that is left.

    Args:
        shape: (C, H, W) of one image; H and W are at least 32.
        classes: the number of logits.
        width: the channels of the first stage. The linear layers have 64 times as many units.

    Raises:
        ValueError: if images are so small that five pools leave nothing of them.
    """

    def __init__(self, shape=(3, 224, 224), classes=1000, width=64):
        super().__init__()
        channels, height, width_in = shape
        if min(height, width_in) < 32:
            raise ValueError(
                "images must be at least 32 x 32 for this network, which halves them five times, "
                f"got {height} x {width_in}"
            )
        self.features = vgg16_features(channels, width)
        channels = 8 * width
        units = 64 * width
        left = channels, height // 32, width_in // 32
        self.classifier = nn.Sequential(
            OrderedDict(
                {
                    "0": FlattenLinear(left, units, activation="relu"),
                    "3": Linear(units, units, activation="relu"),
                    "6": Linear(units, classes),
                }
            )
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Draw random weights as torchvision does: gradients keep their size in the convolutions.

        Here the variance of a weight is 2 / fan_out. In torch.nn's own initialisation it is
        1 / (3 * fan_in), a sixth of it. Then each layer would shrink gradients by about sqrt(6).
        """
        for layer in (*self.features, *self.classifier):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(self.features(x))


class Bottleneck(nn.Module):
    """Three convolutions, whose result is added to their input.

    If the two have different shapes, the input goes through a fourth convolution of 1x1.

    Args:
        channels: the channels of x.
        width: the channels of the 3x3 convolution. The output has four times as many.
        stride: the stride of the 3x3 convolution.

    Shapes: x [N, channels, H, W] to [N, 4 * width, P, Q].
    """

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = Conv2d(channels, width, 1, activation="relu")
        self.conv2 = Conv2d(width, width, 3, stride, 1, activation="relu")
        self.conv3 = Conv2d(width, 4 * width, 1)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(Conv2d(channels, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(convolutions(x) + shortcut(x))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.conv3(self.conv2(self.conv1(x)))
        return y.add_(shortcut).relu_()  # Nothing else needs y, so both work in place.


# What limits ResNet-50, for 224 x 224 images in 16 bits:
#
# - An image needs 8.2 GFLOPs. Half of them are in 1x1 convolutions. From C to K channels, one pixel
#   needs 2*C*K FLOPs and moves 2*(C + K) bytes. That is 51 FLOPs per byte from 64 to 256 channels,
#   as in the early stages, where the memory is therefore the limit.
# - The sums have 5.5 million elements for an image, and move five numbers for each: the addition
#   reads two and writes one, the ReLU reads one and writes one. If the epilogue of the convolution
#   did both, only the shortcut would be read: one number.
class ResNet50(nn.Module):
    """ResNet-50 for inference: images [N, C, H, W] to logits [N, classes].

    It has no batch-norms: `fold` moves those of a trained network into its convolutions. Images may
    have any size.

    Args:
        classes: the number of logits.
        width: the channels of the first convolution.
        blocks: the number of bottlenecks in each stage.
        channels: the channels of an image.
    """

    def __init__(self, classes=1000, width=64, blocks=(3, 4, 6, 3), channels=3):
        super().__init__()
        self.conv1 = Conv2d(channels, width, 7, 2, 3, activation="relu")
        self.maxpool = MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(Bottleneck(channels, width << stage, stride))
                channels = 4 * (width << stage)
            self.add_module(f"layer{stage + 1}", layer)
        self.layers = len(blocks)
        self.fc = Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.maxpool(self.conv1(x))
        for stage in range(self.layers):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def fold(state: dict[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """Move the batch-norms of a trained ResNet into the convolutions before them.

    In inference a batch-norm multiplies each channel by one number and adds another:

        gamma * (conv(x) - mean) / sqrt(var + eps) + beta = scale * conv(x) + beta - scale * mean
        with scale = gamma / sqrt(var + eps)

    Filters multiplied by `scale`, with a bias, compute the same. So the batch-norm costs nothing.

    Args:
        state: a state_dict in torchvision's names: bn1 belongs to conv1, downsample.1 to
            downsample.0, and so on. It is not changed.
        eps: the epsilon of the batch-norms.

    Returns:
        The state_dict for `ResNet50`. It is computed in float64 and has the dtype of the weights.

    Raises:
        ValueError: if the convolution or a parameter of a batch-norm is missing.
    """
    folded = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for norm in [k.removesuffix("running_mean") for k in state if k.endswith("running_mean")]:
        if norm.endswith("downsample.1."):
            conv = norm.removesuffix("1.") + "0."
        else:
            conv = norm.replace("bn", "conv")
        try:
            weight = folded[conv + "weight"]
            gamma, beta, mean, var = (
                folded.pop(norm + name).double()
                for name in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ValueError(f"batch-norm {norm[:-1]} of state lacks {error}") from None
        scale = gamma / torch.sqrt(var + eps)
        bias = folded.get(conv + "bias", torch.zeros_like(mean)).double()
        folded[conv + "weight"] = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
        folded[conv + "bias"] = (beta + scale * (bias - mean)).to(weight.dtype)
    return folded

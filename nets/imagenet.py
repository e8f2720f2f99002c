"""Networks of the size that GPUs are bought for: VGG16 and ResNet-50, made of the kernels.

Parameters have torchvision's names and shapes, so that a state_dict of `torchvision.models.vgg16`
loads as it is, and one of `resnet50` once `fold` has taken its batch-norms into the convolutions:

    VGG16().load_state_dict(torchvision.models.vgg16(weights="DEFAULT").state_dict())
    ResNet50().load_state_dict(fold(torchvision.models.resnet50(weights="DEFAULT").state_dict()))

VGG16 is all kernels: 13 convolutions of 3x3, in five stages, and three linear layers.

    stage     1         2         3         4         5        conv: conv + bias + ReLU
    channels  64        128       256       512       512      last: conv + bias + ReLU + 2x2 pool
    layers    conv last conv last conv conv conv conv
                                  last      last ...           each is one kernel

ResNet-50 is 16 bottlenecks between a first convolution with its pool, and a mean over all pixels
with a linear layer. The sum at the end of a bottleneck is torch's own: a pointwise addition and a
ReLU in place, which keep the memory format of what they are given.

    x ---+---> 1x1, ReLU ---> 3x3, ReLU ---> 1x1 ---> + ---> ReLU --->
         |                                            |
         +--------- (1x1, where shapes differ) -------+

On the way back the convolutions are one stack (conv2d_stack.py): no ReLU and no pool between them
is a pass for its own sake.

From an image in channels_last to the logits no layer converts what another has written, and no
weight is transposed (layers.py); tests/nets/test_layouts.py counts the conversions, and finds none.

What limits them, for 224 x 224 images in 16-bit: of an image VGG16 asks for 30.9 GFLOPs, 30.5 of
them in 3x3 convolutions of 64 channels and more, which do hundreds of FLOPs a byte: tensor cores.
Its first linear layer has 103 million of the 138 million parameters, 206 MB that are read for each
batch, whatever its size: of small batches the memory is the limit. ResNet-50 asks for 8.2 GFLOPs,
half of them in 1x1 convolutions, which do C*K/(C + K) FLOPs a byte (51 for 64 and 256 channels) and
wait for memory in the early stages; so do the sums, 5.5 million elements an image, which are moved
five times (two read and one written, one read and one written) where a fused epilogue would read
the shortcut, and be done.

Sources: Simonyan and Zisserman, Very Deep Convolutional Networks (2014), configuration D; He et
al., Deep Residual Learning (2015), with the stride in the 3x3 convolution as torchvision has it.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .layers import Conv2d, Conv2dReluPool, ConvStack, FlattenLinear, Linear, MaxPool2d

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # of VGG16: channels, and convolutions


def vgg16_features(channels=3, width=64) -> ConvStack:
    """Return VGG16's thirteen convolutions: [N, channels, H, W] to [N, 8 * width, H/32, W/32]."""
    features, place = OrderedDict(), 0  # in torchvision's list, which counts ReLUs and pools
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
    """Return the same of torch.nn, as torchvision has it; it takes the same state_dict."""
    features = nn.Sequential()
    for factor, layers in STAGES:
        for _ in range(layers):
            features.append(nn.Conv2d(channels, factor * width, 3, padding=1))
            features.append(nn.ReLU(inplace=True))
            channels = factor * width
        features.append(nn.MaxPool2d(2))
    return features.to(memory_format=torch.channels_last)


class VGG16(nn.Module):
    """VGG16: images [N, C, H, W] to logits [N, classes].

    torchvision's, but that it averages to 7 x 7 pixels before the linear layers, which for 224 x
    224 images does nothing: here they take the size that is left. Dropout is left out.

    Args:
        shape: one image's (C, H, W), H and W at least 32.
        classes: the number of logits.
        width: channels of the first stage; the linear layers have 64 times as many units.

    Raises:
        ValueError: for images of which five pools leave nothing.
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
        """Draw weights as torchvision does: gradients keep their size through the convolutions.

        With torch.nn's own, each layer with a ReLU would shrink them by the root of 6.
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
    """Three convolutions, and what came in (through a fourth, where its shape differs) added.

    Args:
        channels: of x.
        width: of the 3x3 convolution; the output has four times as many channels.
        stride: of the 3x3 convolution.

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
        return y.add_(shortcut).relu_()  # in place: nobody else needs y


class ResNet50(nn.Module):
    """ResNet-50 for inference: images [N, C, H, W] to logits [N, classes].

    There are no batch-norms: `fold` brings those of a trained network into its convolutions. Images
    may be of any size.

    Args:
        classes: the number of logits.
        width: channels of the first stage.
        blocks: bottlenecks of each stage.
        channels: of an image.
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
    """Take the batch-norms of a trained ResNet into the convolutions before them.

    In inference a batch-norm multiplies each channel by one number and adds another:

        gamma * (conv(x) - mean) / sqrt(var + eps) + beta = scale * conv(x) + beta - scale * mean
        with scale = gamma / sqrt(var + eps)

    so filters that are multiplied by `scale`, and a bias, do the same, and it costs nothing.

    Args:
        state: a state_dict in torchvision's names: bn1 belongs to conv1, downsample.1 to
            downsample.0, and so on. It is left as it is.
        eps: of the batch-norms.

    Returns:
        The state_dict for `ResNet50`, computed in float64, in the dtype that the weights have.

    Raises:
        ValueError: for a batch-norm whose convolution, or whose parameters, are not there.
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

"""Which sizes are worth measuring: layers of networks, and the sizes they give each operator.

The networks are torchvision's, for images of 224 x 224 (https://pytorch.org/vision), and have its
names. ResNet-50 and ResNeXt-50 (32x4d: 32 groups) have the stride in the 3x3 convolution. VGG-16
has no batch normalisation. AlexNet is the one of one tower (Krizhevsky, One weird trick for
parallelizing convolutional neural networks, 2014), whose layers are narrower than those of 2012.
"""

from typing import NamedTuple

CONV = ("N", "C", "H", "W", "K", "R", "S", "stride", "padding", "dilation", "groups")
COLUMNS = tuple(key for key in CONV if key != "K")  # im2col knows no filters


class Shape(NamedTuple):
    """Sizes to measure.

    Attributes:
        name: for people, "resnet50.layer1.0.conv2 n32".
        sizes: by key, the keys of the operator's row.
        count: how often these sizes occur in the network; 1 where there is none.
    """

    name: str
    sizes: dict[str, int]
    count: int = 1


# -------------------------------------------------------------------------------------------------
# Networks
# -------------------------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution of a network, square taps.

    `relu`: a ReLU follows; `add`: but the shortcut is added first.
    """

    name: str
    C: int
    H: int
    K: int
    R: int
    stride: int = 1
    padding: int = 0
    relu: bool = True
    add: bool = False
    groups: int = 1


class Pool(NamedTuple):
    """A max-pool of a network."""

    name: str
    C: int
    H: int
    R: int
    stride: int
    padding: int = 0


class Linear(NamedTuple):
    """A fully connected layer of a network."""

    name: str
    inputs: int
    outputs: int


class Network(NamedTuple):
    """A network: its layers in order, and its trainable parameters; of a part of one, no matter.

    `called`: the network that the layers are of, where the set has another name.
    """

    layers: list[Conv | Pool | Linear]
    tensors: int = 0
    parameters: int = 0
    called: str = ""


def _network(layers: list[Conv | Pool | Linear], normalised: bool = False) -> Network:
    """Count the parameters: weight and bias; normalised convolutions have a scale and a shift."""
    tensors = parameters = 0
    for layer in layers:
        if isinstance(layer, Conv):
            tensors += 3 if normalised else 2
            sums = layer.C // layer.groups * layer.R**2
            parameters += layer.K * (sums + (2 if normalised else 1))
        elif isinstance(layer, Linear):
            tensors += 2
            parameters += layer.outputs * (layer.inputs + 1)
    return Network(layers, tensors, parameters)


def resnet50(groups: int = 1, wider: int = 1) -> Network:
    """ResNet-50 (He et al., 2015), the stride in the 3x3 convolution of a block.

    ResNeXt-50 32x4d (Xie et al., 2017) is the same with 32 groups there, and twice the channels.
    """
    layers = [Conv("conv1", 3, 224, 64, 7, 2, 3), Pool("maxpool", 64, 112, 3, 2, 1)]
    C, H = 64, 56
    for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        outputs, width = 4 * planes, wider * planes
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            layers.append(Conv(f"{name}.conv1", C, H, width, 1))
            layers.append(Conv(f"{name}.conv2", width, H, width, 3, stride, 1, groups=groups))
            layers.append(Conv(f"{name}.conv3", width, H // stride, outputs, 1, add=True))
            if block == 0:
                shortcut = f"{name}.downsample.0"
                layers.append(Conv(shortcut, C, H, outputs, 1, stride, relu=False))
            C, H = outputs, H // stride
    return _network([*layers, Linear("fc", 2048, 1000)], normalised=True)


def resnet50_3x3() -> Network:
    """Of ResNet-50 the 3x3 convolutions."""
    layers = resnet50().layers
    return Network([x for x in layers if isinstance(x, Conv) and x.R == 3], called="resnet50")


def resnext50() -> Network:
    """Of ResNeXt-50 32x4d the convolutions with groups; the others are much as in ResNet-50."""
    layers = resnet50(groups=32, wider=2).layers
    return Network([x for x in layers if isinstance(x, Conv) and x.groups > 1])


def stems() -> Network:
    """The first layer of each network for colour images."""
    return Network([make().layers[0]._replace(name=make.__name__)
                    for make in (resnet50, alexnet, vgg16)])  # fmt: skip


def vgg16(H: int = 224, width: int = 64) -> Network:
    """VGG-16 (Simonyan and Zisserman, 2014), configuration D; images of H x H, or wider or not."""
    layers: list[Conv | Pool | Linear] = []
    C, place = 3, 0
    for wider, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convolutions):
            layers.append(Conv(f"features.{place}", C, H, wider * width, 3, padding=1))
            C, place = wider * width, place + 2  # a ReLU is between
        layers.append(Pool(f"features.{place}", C, H, 2, 2))
        H, place = H // 2, place + 1
    layers += [
        Linear("classifier.0", C * H * H, 64 * width),
        Linear("classifier.3", 64 * width, 64 * width),
        Linear("classifier.6", 64 * width, 1000),
    ]
    return _network(layers)


def alexnet() -> Network:
    """AlexNet of one tower, as torchvision has it."""
    return _network(
        [
            Conv("features.0", 3, 224, 64, 11, 4, 2),
            Pool("features.2", 64, 55, 3, 2),
            Conv("features.3", 64, 27, 192, 5, padding=2),
            Pool("features.5", 192, 27, 3, 2),
            Conv("features.6", 192, 13, 384, 3, padding=1),
            Conv("features.8", 384, 13, 256, 3, padding=1),
            Conv("features.10", 256, 13, 256, 3, padding=1),
            Pool("features.12", 256, 13, 3, 2),
            Linear("classifier.1", 256 * 6 * 6, 4096),
            Linear("classifier.4", 4096, 4096),
            Linear("classifier.6", 4096, 1000),
        ]
    )


def demo() -> Network:
    """The CNN of nets/models.py for 28 x 28 grey images and 10 classes."""
    return _network(
        [
            Conv("conv1", 1, 28, 16, 3),
            Pool("pool1", 16, 26, 2, 2),
            Conv("conv2", 16, 13, 32, 3),
            Pool("pool2", 32, 11, 2, 2),
            Linear("fc", 800, 10),
        ]
    )


# -------------------------------------------------------------------------------------------------
# What a layer is for an operator: sizes from the layer, the one that follows, and the batch N.
# None where the operator has no part in it.
# -------------------------------------------------------------------------------------------------


def convolution(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of a convolution."""
    if not isinstance(layer, Conv):
        return None
    sizes = (N, layer.C, layer.H, layer.H, layer.K, layer.R, layer.R, layer.stride, layer.padding)
    return dict(zip(CONV, (*sizes, 1, layer.groups), strict=True))


def convolution_and_relu(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of a convolution whose ReLU follows at once: no shortcut is added before."""
    alone = isinstance(layer, Conv) and layer.relu and not layer.add
    return convolution(layer, following, N) if alone else None


def convolution_relu_and_pool(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of a convolution of stride 1 before a pool that halves each side."""
    halved = isinstance(following, Pool) and following[3:] == (2, 2, 0)
    halved = halved and isinstance(layer, Conv) and layer.stride == 1
    return convolution(layer, following, N) if halved else None


def columns(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of a convolution's columns, which do not depend on its filters."""
    sizes = convolution(layer, following, N)
    return sizes and {key: sizes[key] for key in COLUMNS}


def relu(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of what a ReLU behind a convolution is given."""
    if not isinstance(layer, Conv) or not layer.relu:
        return None
    P = (layer.H + 2 * layer.padding - layer.R) // layer.stride + 1
    return {"N": N, "C": layer.K, "H": P, "W": P}


def pool(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of a max-pool."""
    if not isinstance(layer, Pool):
        return None
    _, C, H, R, stride, padding = layer
    return {"N": N, "C": C, "H": H, "W": H, "R": R, "stride": stride, "padding": padding}


def product(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of a fully connected layer's product."""
    return {"M": N, "N": layer.outputs, "K": layer.inputs} if isinstance(layer, Linear) else None


def scores(layer, following, N: int) -> dict[str, int] | None:
    """The sizes of what the last layer gives: a score for each class."""
    last = isinstance(layer, Linear) and following is None
    return {"M": N, "N": layer.outputs} if last else None


# -------------------------------------------------------------------------------------------------
# Sets that are no network: the shapes for a batch N, which may mean rows or tokens.
# -------------------------------------------------------------------------------------------------


def square(N: int) -> list[Shape]:
    """Products of 256 ... 16384 squared."""
    sides = [2**power for power in range(8, 15)]
    return [Shape(f"square {side}", {"M": side, "N": side, "K": side}) for side in sides]


def skinny(N: int) -> list[Shape]:
    """Products with one side much shorter or longer than the others."""
    sizes = [(M, 4096, 4096) for M in (1, 16, 64, 256)]  # few rows: weights through memory
    sizes += [(4096, N, 4096) for N in (16, 64)]  # few columns
    sizes += [(65536, 64, 64), (65536, 256, 64)]  # small K: output through memory
    sizes += [(64, 64, 65536), (256, 256, 65536)]  # few tiles, long sums: what split-K is for
    return [Shape(f"skinny {M}x{N}x{K}", {"M": M, "N": N, "K": K}) for M, N, K in sizes]


# Name, width, width within the MLP, matrices that widen there, vocabulary, heads, positions.
# GPT-2 small (Radford et al., 2019); Llama 7B (Touvron et al., 2023), whose MLP has a gate beside.
_TRANSFORMERS = (
    ("gpt2", 768, 3072, 1, 50257, 12, 1024),
    ("llama7b", 4096, 11008, 2, 32000, 32, 2048),
)


def transformer_products(N: int) -> list[Shape]:
    """The layers of transformers, N tokens at a time."""
    found = []
    for name, width, inner, widening, vocabulary, _, _ in _TRANSFORMERS:
        for layer, outputs, inputs, count in (
            ("qkv", 3 * width, width, 1),
            ("attention_out", width, width, 1),
            ("mlp_up", inner, width, widening),
            ("mlp_down", width, inner, 1),
            ("vocabulary", vocabulary, width, 1),
        ):
            sizes = {"M": N, "N": outputs, "K": inputs}
            found.append(Shape(f"{name}.{layer} m{N}", sizes, count))
    return found


def transformer_scores(N: int) -> list[Shape]:
    """A row of attention scores for each head and each of N tokens."""
    return [
        Shape(f"{name}.attention m{heads * N}", {"M": heads * N, "N": positions})
        for name, _, _, _, _, heads, positions in _TRANSFORMERS
    ]


def transformer_vocabulary(N: int) -> list[Shape]:
    """A row of the vocabulary's scores for each of N tokens."""
    return [Shape(f"{name}.vocabulary m{N}", {"M": N, "N": words})
            for name, _, _, _, words, _, _ in _TRANSFORMERS]  # fmt: skip


def classes(N: int) -> list[Shape]:
    """N rows of 10 ... 50257 classes."""
    many = (10, 100, 1000, 4096, 16384, 50257)
    return [Shape(f"classes {count} m{N}", {"M": N, "N": count}) for count in many]


def parameters(N: int, name: str, network: Network) -> list[Shape]:
    """A network's parameters, each tensor of the mean size."""
    elements = round(network.parameters / network.tensors)
    return [Shape(f"{name} parameters", {"tensors": network.tensors, "elements": elements})]


# Name, channels, height, stride and count of the 3x3 depthwise layers. Version 1: Howard et al.,
# MobileNets, 2017, table 1 (whose last layer has stride 1, or 7 x 7 pixels would not stay as many).
# Version 2: Sandler et al., MobileNetV2, 2018, named by torchvision's blocks.
_MOBILENETS = (
    ("v1.dw1", 32, 112, 1, 1),
    ("v1.dw2", 64, 112, 2, 1),
    ("v1.dw3", 128, 56, 1, 1),
    ("v1.dw4", 128, 56, 2, 1),
    ("v1.dw5", 256, 28, 1, 1),
    ("v1.dw6", 256, 28, 2, 1),
    ("v1.dw7", 512, 14, 1, 5),
    ("v1.dw12", 512, 14, 2, 1),
    ("v1.dw13", 1024, 7, 1, 1),
    ("v2.features.2", 96, 112, 2, 1),  # the first is version 1's first
    ("v2.features.3", 144, 56, 1, 1),
    ("v2.features.4", 144, 56, 2, 1),
    ("v2.features.5", 192, 28, 1, 2),
    ("v2.features.7", 192, 28, 2, 1),
    ("v2.features.8", 384, 14, 1, 4),
    ("v2.features.12", 576, 14, 1, 2),
    ("v2.features.14", 576, 14, 2, 1),
    ("v2.features.15", 960, 7, 1, 3),
)


def mobilenet(N: int) -> list[Shape]:
    """The depthwise layers of two MobileNets."""
    found = []
    for name, C, H, stride, count in _MOBILENETS:
        sizes = dict(zip(CONV, (N, C, H, H, C, 3, 3, stride, 1, 1, C), strict=True))
        found.append(Shape(f"mobilenet.{name} n{N}", sizes, count))
    return found

"""Which sizes are measured: named sets, and ranges. `--shapes help` prints what `describe` returns.

    square                         products of 256 ... 16384 squared
    resnet50                       every layer of ResNet-50 that the operator has, batch 32 and 256
    resnet50@64,vgg16@64           two sets, batch 64
    resnet50_3x3@32                some of its layers, as resnext50 and stems are of theirs
    m=1024:8192:1024               a range, ends included: n and k follow m unless they are given
    m=256*2:16384,k=64             doubling instead of adding
    n=32,c=64,h=56,k=64,r=3,padding=1

The networks are torchvision's, for images of 224 x 224 (https://pytorch.org/vision), and named as
there: ResNet-50 and ResNeXt-50 (32x4d: 32 groups) with the stride in the 3x3 convolution, VGG-16
without batch normalisation, and the AlexNet of one tower (Krizhevsky, One weird trick for
parallelizing convolutional neural networks, 2014), whose layers are narrower than those of 2012.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tilelab.perf.errors import PerfError

MOST = 10_000  # shapes of a range: more than that is a slip of the keyboard


class Shape(NamedTuple):
    """Sizes to measure.

    Attributes:
        name: for people, "resnet50.layer1.0.conv2 n32".
        sizes: by key, see KEYS.
        count: how often these sizes occur in the network; 1 where there is none.
    """

    name: str
    sizes: dict[str, int]
    count: int = 1


MATMULS = ("matmul", "matmul_bias_relu", "scaled_matmul")
_CONV = ("N", "C", "H", "W", "K", "R", "S", "stride", "padding", "dilation", "groups")
KEYS = {
    "matmul": ("M", "N", "K"),
    "matmul_bias_relu": ("M", "N", "K"),
    "scaled_matmul": ("M", "N", "K"),
    "conv2d": _CONV,
    "conv2d_bias_relu": _CONV,
    "conv2d_im2col": _CONV,
    "conv2d_relu_pool": _CONV,
    "im2col": _CONV,
    "col2im": _CONV,
    "bias_relu": ("N", "C", "H", "W"),
    "softmax": ("M", "N"),
    "cross_entropy": ("M", "N"),
    "max_pool2d": ("N", "C", "H", "W", "R", "stride", "padding"),
    "sgd": ("tensors", "elements"),
    "adamw": ("tensors", "elements"),
    "train_step": ("N",),
    "conv_stack": ("N", "H", "width"),
}
# What a range expression need not give: a number, or the key whose value it takes.
_DEFAULTS = {
    **dict.fromkeys(
        [op for op, keys in KEYS.items() if keys is _CONV],
        {"W": "H", "S": "R", "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    ),
    **dict.fromkeys(MATMULS, {"N": "M", "K": "M"}),
    "bias_relu": {"W": "H"},
    "max_pool2d": {"W": "H", "stride": "R", "padding": 0},
    "sgd": {"tensors": 1},
    "adamw": {"tensors": 1},
    "conv_stack": {"H": 224, "width": 64},
}


def shapes(op: str, text: str, batches: Sequence[int] = (32, 256)) -> list[Shape]:
    """Return what `text` stands for, each shape once.

    Args:
        op: the operator, a key of KEYS.
        text: names of sets with commas between them, each with "@" and a batch if wanted; or sizes
            as `key=value`, `key=start:stop:step` or `key=start*factor:stop`.
        batches: of the networks, where none is given.

    Raises:
        PerfError: for an unknown operator, set or key, for sizes that do not fit each other, and
            for a set that has nothing for this operator.
    """
    if op not in KEYS:
        raise PerfError(f"unknown operator {op!r}: there are {', '.join(KEYS)}")
    found = _range(op, text) if "=" in text else _sets(op, text, batches)
    once: dict[tuple, Shape] = {}
    for shape in found:
        problem = _misfit(op, shape.sizes)
        if problem:
            raise PerfError(f"{op} {shape.name}: {problem}")
        once.setdefault(tuple(shape.sizes.items()), shape)
    return list(once.values())


def describe() -> str:
    """Return a table of the sets: what each is, and for which operators."""
    lines = ["set          what it is", ""]
    for name, (meaning, _) in SETS.items():
        lines.append(f"{name:12} {meaning}")
        counts = {op: len(_one_set(op, name, None, (32,))) for op in KEYS}
        groups = [f"{op} {count}" for op, count in counts.items() if count]
        text = ", ".join(groups)
        while len(text) > 80:
            end = text.rindex(", ", 0, 80)
            lines.append(f"{'':12} {text[: end + 1]}")
            text = text[end + 2 :]
        lines += [f"{'':12} {text}", ""]
    lines += [
        "After each operator: how many shapes. Networks have as many for each batch, 32 and 256",
        "unless given: resnet50@64. In transformer the batch is the tokens, in classes the rows.",
        "",
        "Or sizes, a range of one or more of them, ends included:",
        "  m=1024:8192:1024,n=4096,k=64      m=256*2:16384 (doubling; n and k follow m)",
        "  n=32,c=64,h=56,k=64,r=3,padding=1 (w follows h, s follows r, stride and dilation are 1)",
    ]
    return "\n".join(lines)


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


def _of_network(op: str, name: str, network: Network, batch: int) -> list[Shape]:
    """Return what a network means for an operator, equal layers once and counted."""
    if op in ("sgd", "adamw"):
        if not network.parameters:
            return []
        elements = round(network.parameters / network.tensors)
        sizes = {"tensors": network.tensors, "elements": elements}
        return [Shape(f"{name} parameters", sizes)]
    if op == "train_step":
        return [Shape(f"{name} n{batch}", {"N": batch})] if name == "demo" else []
    if op == "conv_stack":
        sizes = {"N": batch, **_DEFAULTS[op]}
        return [Shape(f"{name}.features n{batch}", sizes)] if name == "vgg16" else []
    found: dict[tuple, Shape] = {}
    for layer, following in itertools.zip_longest(network.layers, network.layers[1:]):
        sizes = sizes_of(op, layer, following, batch)
        if sizes:
            # How many filters there are is nothing to the columns.
            skip = "K" if op in ("im2col", "col2im") else ""
            same = tuple(size for key, size in sizes.items() if key != skip)
            called = f"{network.called or name}.{layer.name} n{batch}"
            first = found.get(same, Shape(called, sizes, 0))
            found[same] = first._replace(count=first.count + 1)
    return list(found.values())


def sizes_of(op, layer, following, N: int) -> dict[str, int] | None:
    """Return the sizes of one layer, if the operator is part of it."""
    if isinstance(layer, Conv):
        _, C, H, K, R, stride, padding, relu, add, groups = layer
        P = (H + 2 * padding - R) // stride + 1
        if op == "bias_relu" and relu:
            return {"N": N, "C": K, "H": P, "W": P}
        halved = isinstance(following, Pool) and following[3:] == (2, 2, 0) and stride == 1
        if (
            op in ("conv2d", "conv2d_im2col", "im2col", "col2im")
            or (op == "conv2d_bias_relu" and relu and not add)
            or (op == "conv2d_relu_pool" and halved)
        ):
            return dict(zip(_CONV, (N, C, H, H, K, R, R, stride, padding, 1, groups), strict=True))
    elif isinstance(layer, Pool) and op == "max_pool2d":
        _, C, H, R, stride, padding = layer
        return {"N": N, "C": C, "H": H, "W": H, "R": R, "stride": stride, "padding": padding}
    elif isinstance(layer, Linear):
        if op in MATMULS:
            return {"M": N, "N": layer.outputs, "K": layer.inputs}
        if op in ("softmax", "cross_entropy") and following is None:
            return {"M": N, "N": layer.outputs}
    return None


# -------------------------------------------------------------------------------------------------
# Sets. Each function gets the operator and the batch that was asked for, or None.
# -------------------------------------------------------------------------------------------------


def _square(op: str, batch: int | None) -> list[Shape]:
    if op not in MATMULS:
        return []
    sides = [2**power for power in range(8, 15)]
    return [Shape(f"square {side}", {"M": side, "N": side, "K": side}) for side in sides]


def _skinny(op: str, batch: int | None) -> list[Shape]:
    if op not in MATMULS:
        return []
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


def _transformer(op: str, batch: int | None) -> list[Shape]:
    found, M = [], batch or 4096
    for name, width, inner, widening, vocabulary, heads, positions in _TRANSFORMERS:
        if op in MATMULS:
            found += [
                Shape(f"{name}.qkv m{M}", {"M": M, "N": 3 * width, "K": width}),
                Shape(f"{name}.attention_out m{M}", {"M": M, "N": width, "K": width}),
                Shape(f"{name}.mlp_up m{M}", {"M": M, "N": inner, "K": width}, widening),
                Shape(f"{name}.mlp_down m{M}", {"M": M, "N": width, "K": inner}),
                Shape(f"{name}.vocabulary m{M}", {"M": M, "N": vocabulary, "K": width}),
            ]
        elif op == "softmax":  # a row of scores for each head and token
            sizes = {"M": heads * M, "N": positions}
            found.append(Shape(f"{name}.attention m{heads * M}", sizes))
        elif op == "cross_entropy":
            found.append(Shape(f"{name}.vocabulary m{M}", {"M": M, "N": vocabulary}))
    if op in ("sgd", "adamw"):  # 124,439,808 parameters in 148 tensors
        found = [Shape("gpt2 parameters", {"tensors": 148, "elements": 840_809})]
    return found


def _classes(op: str, batch: int | None) -> list[Shape]:
    if op not in ("softmax", "cross_entropy"):
        return []
    rows = batch or 4096
    many = (10, 100, 1000, 4096, 16384, 50257)
    return [Shape(f"classes {N} m{rows}", {"M": rows, "N": N}) for N in many]


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


def _mobilenet(op: str, batch: int | None) -> list[Shape]:
    if op != "conv2d":
        return []
    N, found = batch or 32, []
    for name, C, H, stride, count in _MOBILENETS:
        sizes = dict(zip(_CONV, (N, C, H, H, C, 3, 3, stride, 1, 1, C), strict=True))
        found.append(Shape(f"mobilenet.{name} n{N}", sizes, count))
    return found


_TINY = {  # sizes that divide nothing, and no two of them alike
    **dict.fromkeys(MATMULS, [(37, 29, 53)]),
    "bias_relu": [(2, 7, 5, 3)],
    "softmax": [(11, 37)],
    "cross_entropy": [(11, 37)],
    "max_pool2d": [(2, 7, 13, 11, 3, 2, 1)],
    "sgd": [(5, 1031)],
    "adamw": [(5, 1031)],
    "train_step": [(3,)],
    "conv_stack": [(2, 37, 7)],
    "conv2d_relu_pool": [(2, 5, 11, 13, 7, 3, 3, 1, 1, 1, 1)],
    **dict.fromkeys(
        ("conv2d", "conv2d_bias_relu", "conv2d_im2col", "im2col", "col2im"),
        [(2, 5, 11, 13, 7, 3, 2, 1, 1, 1, 1), (2, 6, 11, 13, 9, 3, 3, 2, 1, 2, 3)],
    ),
}


def _tiny(op: str, batch: int | None) -> list[Shape]:
    return [
        Shape(f"tiny {i}", dict(zip(KEYS[op], sizes, strict=True)))
        for i, sizes in enumerate(_TINY[op], start=1)
    ]


SETS: dict[str, tuple[str, Callable[[str, int | None], list[Shape]] | Callable[[], Network]]] = {
    "square": ("products of 256, 512 ... 16384 squared", _square),
    "skinny": ("products with one side much shorter or longer than the others", _skinny),
    "transformer": (
        "GPT-2 small and Llama 7B: layers, scores, vocabulary; 4096 tokens",
        _transformer,
    ),
    "resnet50": ("ResNet-50 for 224 x 224 images, as torchvision has it", resnet50),
    "vgg16": ("VGG-16 for 224 x 224 images; conv2d_relu_pool where a pool follows", vgg16),
    "alexnet": ("AlexNet of one tower for 224 x 224 images, as torchvision has it", alexnet),
    "mobilenet": ("depthwise layers of MobileNet v1 and v2, 224 x 224, batch 32", _mobilenet),
    "demo": ("the CNN that nets/train.py trains, batch 64", demo),
    "resnet50_3x3": ("the 3x3 convolutions of ResNet-50", resnet50_3x3),
    "resnext50": ("the grouped convolutions of ResNeXt-50 32x4d: 3x3, 32 groups", resnext50),
    "stems": ("three channels in: the first layers of ResNet-50, AlexNet and VGG-16", stems),
    "classes": ("4096 rows of 10, 100, 1000, 4096, 16384 and 50257 classes", _classes),
    "tiny": ("sizes that divide nothing; seconds in the interpreter", _tiny),
}
NETWORKS = ("resnet50", "vgg16", "alexnet", "demo", "resnet50_3x3", "resnext50", "stems")
WITH_BATCH = (*NETWORKS, "mobilenet", "transformer", "classes")


def _sets(op: str, text: str, batches: Sequence[int]) -> Iterator[Shape]:
    for part in text.split(","):
        name, at, batch = part.strip().partition("@")
        if name not in SETS:
            raise PerfError(f"unknown set of shapes {name!r}: there are {', '.join(SETS)}")
        if at and name not in WITH_BATCH:
            raise PerfError(f"{part}: {name} has no batch; {', '.join(WITH_BATCH)} have")
        if at and not (batch.isascii() and batch.isdigit() and int(batch) > 0):
            raise PerfError(f"{part}: the batch after @ must be a positive number")
        found = _one_set(op, name, int(batch) if at else None, batches)
        if not found:
            have = [other for other in SETS if _one_set(op, other, None, batches)]
            raise PerfError(f"{name} has no shapes for {op}; these have: {', '.join(have)}")
        yield from found


def _one_set(op: str, name: str, batch: int | None, batches: Sequence[int]) -> list[Shape]:
    make = SETS[name][1]
    if name not in NETWORKS:
        return make(op, batch)
    network = make()
    if op in ("sgd", "adamw"):
        return _of_network(op, name, network, 1)
    several = (batch,) if batch else (64,) if name == "demo" else batches
    return [shape for N in several for shape in _of_network(op, name, network, N)]


# -------------------------------------------------------------------------------------------------
# Ranges
# -------------------------------------------------------------------------------------------------


def _range(op: str, text: str) -> list[Shape]:
    """Return every combination of the given sizes."""
    keys = {key.lower(): key for key in KEYS[op]}
    given: dict[str, list[int]] = {}
    for part in text.split(","):
        name, equals, values = part.strip().partition("=")
        if not equals:
            raise PerfError(f"{text}: {part!r} is no size; sets and sizes do not mix")
        if name.lower() not in keys:
            raise PerfError(f"{op} has no size {name!r}: it has {', '.join(KEYS[op])}")
        if keys[name.lower()] in given:
            raise PerfError(f"{text}: {name} is given twice")
        given[keys[name.lower()]] = _values(part.strip(), values)
    defaults = _DEFAULTS.get(op, {})
    missing = [key for key in KEYS[op] if key not in given and key not in defaults]
    if missing:
        raise PerfError(f"{text}: {op} needs {', '.join(missing)} too")
    total = 1
    for values in given.values():
        total *= len(values)
    if total > MOST:
        raise PerfError(f"{text}: {total} shapes; at most {MOST}")
    found = []
    for combination in itertools.product(*given.values()):
        sizes = dict(zip(given, combination, strict=True))
        for key, value in defaults.items():
            sizes.setdefault(key, sizes[value] if isinstance(value, str) else value)
        sizes = {key: sizes[key] for key in KEYS[op]}
        found.append(Shape(" ".join(f"{key}={value}" for key, value in sizes.items()), sizes))
    return found


def _values(part: str, text: str) -> list[int]:
    """Return the values of "7", "1024:8192:1024" or "256*2:16384", ends included."""
    match = re.fullmatch(r"(\d{1,12})(?:\*(\d+):(\d{1,12})|:(\d{1,12}):(\d+))?", text, re.ASCII)
    if not match:
        raise PerfError(f"{part}: a size is 7, 1024:8192:1024 (start:stop:step) or 256*2:16384")
    start, factor, last, stop, step = (int(group) if group else None for group in match.groups())
    if factor is not None:
        if start < 1 or factor < 2 or last < start:
            raise PerfError(f"{part}: this range is empty, or without an end")
        values = [start]
        while values[-1] * factor <= last:
            values.append(values[-1] * factor)
        return values
    if step is not None:
        if step < 1 or stop < start:
            raise PerfError(f"{part}: this range is empty, or without an end")
        if (stop - start) // step >= MOST:
            raise PerfError(f"{part}: {(stop - start) // step + 1} shapes; at most {MOST}")
        return list(range(start, stop + 1, step))
    return [start]


def _misfit(op: str, sizes: dict[str, int]) -> str | None:
    """Return why these sizes do not make a workload."""
    for key, value in sizes.items():
        if value < (0 if key == "padding" else 1):
            return f"{key} must be positive, got {value}"
    if op == "conv_stack" and sizes["H"] < 32:
        return "five pools leave nothing of an image of less than 32 x 32"
    if "R" not in sizes:
        return None
    R, S, dilation = sizes["R"], sizes.get("S", sizes["R"]), sizes.get("dilation", 1)
    outputs = [
        (size + 2 * sizes["padding"] - dilation * (taps - 1) - 1) // sizes["stride"] + 1
        for size, taps in ((sizes["H"], R), (sizes["W"], S))
    ]
    if min(outputs) < 1:
        return f"{R} x {S} taps do not fit into the padded image"
    if op == "max_pool2d":
        return "padding must be half of the window at most" if sizes["padding"] > R // 2 else None
    if sizes["C"] % sizes["groups"] or sizes["K"] % sizes["groups"]:
        return f"groups={sizes['groups']} must divide C={sizes['C']} and K={sizes['K']}"
    if op == "conv2d_relu_pool":
        if (sizes["stride"], dilation, sizes["groups"]) != (1, 1, 1):
            return "stride, dilation and groups must be 1"
        if min(outputs) < 2:
            return "nothing is left of the convolution to pool"
    return None

"""What the user passed: checks of arguments, and the dtypes and precision that torch would use.

A check raises before anything is launched: TypeError for a dtype or a device, ValueError for a
shape or a value. Its message names the argument and shows what was received.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tilelab.kernels import _launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensors(
    optional: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **tensors: torch.Tensor | None,
) -> None:
    """All are tensors of one dtype of `dtypes`, on one device that the kernels can run on.

    Those named in `optional` may be None.
    """
    first_name, first = next(iter(tensors.items()))
    dtype = device = None  # the first's, once it has passed
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype is dtype and x.device == device and x.layout is torch.strided:
            continue  # as the first
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {either(dtypes)}, got {short_name(x.dtype)}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got {x.layout}")
        if x.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name} ({short_name(first.dtype)}), "
                f"got {short_name(x.dtype)}"
            )
        check_device(name, x, first_name, first)
        dtype, device = first.dtype, first.device


def check_device(name: str, x: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """`x` is where `first` is, and that is a place where kernels can run."""
    if x.device != first.device:
        raise TypeError(f"{name} must be on {first.device} like {first_name}, got {x.device}")
    if x.device.type not in ("cuda", "meta") and _launch.on_gpu():
        raise TypeError(
            f"{name} is on {x.device}, but the kernels are compiled for the GPU: move it there, "
            "or set TRITON_INTERPRET=1 before python starts to run them on the CPU"
        )


def check_shape(name: str, x: torch.Tensor, shape: str, **expected: int | None) -> None:
    """`check_shape("bias", bias, "[N]", N=128)`: the rank, and the sizes that are not None."""
    sizes = x.shape
    if len(sizes) == len(expected):
        for want, got in zip(expected.values(), sizes, strict=False):
            if want != got and want is not None:
                break
        else:
            return
    known = ", ".join(f"{k}={v}" for k, v in expected.items() if v is not None)
    raise ValueError(
        f"{name} must have shape {shape}{' with ' + known if known else ''}, got {list(sizes)}"
    )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """An int, or a pair of ints (height, width), as a pair; each at least `minimum`."""
    if type(value) is int and value >= minimum:  # most calls
        return value, value
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    ok = isinstance(value, (tuple, list)) and len(value) == 2
    if not (ok and is_int(value[0]) and is_int(value[1])):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    first, second = value
    if first < minimum or second < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return first, second


def is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def either(dtypes: Sequence[torch.dtype]) -> str:
    """'float32, float16 or bfloat16'."""
    *names, last = map(short_name, dtypes)
    return f"{', '.join(names)} or {last}" if names else last


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under `torch.autocast`, the tensors in its dtype (what it does for torch's own matmul)."""
    first = tensors[0]
    if not isinstance(first, torch.Tensor) or not _autocast_is_on(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    floats = [isinstance(x, torch.Tensor) and x.dtype in DTYPES for x in tensors]
    return tuple(x.to(dtype) if f else x for x, f in zip(tensors, floats, strict=True))


def reduction_dtype(x: torch.Tensor) -> torch.dtype:
    """The result's dtype for softmax and losses: x's, but float32 under `torch.autocast`.

    torch casts x for that. A kernel that computes in float32 anyway reads x as it is.
    """
    return torch.float32 if _autocast_is_on(x) else x.dtype


def _autocast_is_on(x: torch.Tensor) -> bool:
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else None  # where kernels run
    return device is not None and torch.is_autocast_enabled(device)


def dot_precision(dtype: torch.dtype, switch: Any) -> str:
    """How `tl.dot` treats float32: "tf32" where torch's own switch allows it, else "ieee".

    `switch` is `torch.backends.cuda.matmul` or `torch.backends.cudnn.conv`; the older `allow_tf32`
    flags set the same state.
    """
    tf32 = dtype == torch.float32 and switch.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"

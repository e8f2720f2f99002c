"""Checks of the arguments that a user passes, and the dtype and precision that torch would use.

A check raises before anything is launched: TypeError for a dtype or a device, ValueError for a
shape or a value. Its message names the argument and shows what was passed.
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
    """Raise TypeError unless all are tensors of one dtype, on one device that kernels can run on.

    The dtype must be one of `dtypes`. Tensors that are named in `optional` may be None.
    """
    first_name, first = next(iter(tensors.items()))
    dtype = device = None  # those of the first tensor, after its checks
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype is dtype and x.device == device and x.layout is torch.strided:
            continue  # it is like the first, so the checks below pass
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
    """Raise TypeError unless `x` is on the device of `first`, and kernels can run there."""
    if x.device != first.device:
        raise TypeError(f"{name} must be on {first.device} like {first_name}, got {x.device}")
    if x.device.type not in ("cuda", "meta") and _launch.on_gpu():
        raise TypeError(
            f"{name} is on {x.device}, but the kernels are compiled for the GPU: move it there, "
            "or set TRITON_INTERPRET=1 before python starts to run them on the CPU"
        )


def check_shape(name: str, x: torch.Tensor, shape: str, **expected: int | None) -> None:
    """Raise ValueError unless x has the rank, and each size that is not None, of `expected`.

    An example is `check_shape("bias", bias, "[N]", N=128)`. `shape` is for the message.
    """
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
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """Return an int or a pair of ints as a pair (height, width). Each must be >= `minimum`."""
    if type(value) is int and value >= minimum:  # most calls end here
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
    """Return the names as in 'float32, float16 or bfloat16'."""
    *names, last = map(short_name, dtypes)
    return f"{', '.join(names)} or {last}" if names else last


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors, cast to the dtype of `torch.autocast` if it is on.

    autocast does the same for torch's own matmul.
    """
    first = tensors[0]
    if not isinstance(first, torch.Tensor) or not _autocast_is_on(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    floats = [isinstance(x, torch.Tensor) and x.dtype in DTYPES for x in tensors]
    return tuple(x.to(dtype) if f else x for x, f in zip(tensors, floats, strict=True))


def reduction_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the result's dtype for softmax and losses: x's, but float32 under `torch.autocast`.

    torch casts x to float32 for that. Our kernels compute in float32 anyway, and need no cast.
    """
    return torch.float32 if _autocast_is_on(x) else x.dtype


def _autocast_is_on(x: torch.Tensor) -> bool:
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else None  # kernels run on no other device
    return device is not None and torch.is_autocast_enabled(device)


def dot_precision(dtype: torch.dtype, switch: Any) -> str:
    """Return `input_precision` for `tl.dot`: "tf32" if torch's own switch allows it, else "ieee".

    `switch` is `torch.backends.cuda.matmul` or `torch.backends.cudnn.conv`. The older flags
    `allow_tf32` set the same state. Only float32 operands can be rounded to TF32.
    """
    tf32 = dtype == torch.float32 and switch.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"

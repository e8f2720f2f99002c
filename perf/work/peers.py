"""The peers: the implementations that ours are compared with, each set up to run at its best."""

import os
from collections.abc import Callable

import torch

PEERS = {
    "torch": "PyTorch: cuBLAS, cuDNN in channels_last with benchmark=True",
    "graph": "PyTorch as above, a whole training step in a CUDA graph (train_step)",
    "compile": "torch.compile, max-autotune; a training step in a CUDA graph",
    "inductor": "Inductor's own Triton template (products and convolutions forward)",
}


def as_peer(impl: str, forward: Callable) -> Callable:
    """`forward` as `impl` runs it; what is no peer runs it as it is."""
    if impl not in ("compile", "inductor"):
        return forward
    _set_up_compile()
    if impl == "compile":
        return torch.compile(forward, mode="max-autotune-no-cudagraphs", dynamic=False)
    options = {
        "max_autotune": True,
        "max_autotune_gemm_backends": "TRITON",
        "max_autotune_conv_backends": "TRITON",
    }
    return torch.compile(forward, options=options, dynamic=False)


def _set_up_compile():
    """Settings of torch.compile without which it would not be a peer, or would not run."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from triton import knobs

    functorch.donated_buffer = False  # a gradient is taken again and again, of one forward pass
    # Beyond its limit of recompilations it would run uncompiled, and only a log would say so.
    dynamo.fail_on_recompile_limit_hit = True
    inductor.autotune_num_choices_displayed = 0  # no tables on the screen
    # Inductor moves Triton's cache, unless it has a place: our compiled tiles are in the usual one.
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)


def forget_compiled() -> None:
    """Let torch.compile start afresh: it compiles a function for eight sets of shapes at most.

    All workloads are one function to it. What was compiled before is compiled again if called.
    """
    torch._dynamo.reset()

"""The bars for machine code: one table of what every launch is held to, by its facts alone.

`problems` takes a row of `compile_facts.Launches` with its fact, and names the bars that it misses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tilelab.kernels import conv2d_depthwise

KIB = 1024
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}


class Bars(NamedTuple):
    """Bars that some launches are held to. None stands for every kernel, or every target.

    Attributes:
        groups: of compile_cases.py.
        kernels: their names.
        targets: such as "sm_90".
        missed: by what is wrong in words: whether a launch misses that bar.
    """

    groups: tuple[str, ...]
    kernels: tuple[str, ...] | None
    targets: tuple[str, ...] | None
    missed: dict[str, Callable[[dict], Any]]

    def hold_for(self, row: dict) -> bool:
        """Whether a launch is held to these bars."""
        at = zip(self[:3], (row["group"], row["kernel"], row["target"]), strict=True)
        return all(names is None or name in names for names, name in at)


def problems(row: dict) -> list[str]:
    """What is wrong with a launch."""
    if "error" in row:
        return ["does not compile"]
    held = [bars.missed.items() for bars in BARS if bars.hold_for(row)]
    return list(dict.fromkeys(what for bars in held for what, missed in bars if missed(row)))


def describe(row: dict) -> str:
    """Which launch it is, and its fact."""
    about = ("target", "group", "case", "dtype", "tile", "constants", "options", "key")
    fact = {k: v for k, v in row.items() if k not in (*about, "kernel")}
    tile = row["tile"] or {k: v for k, v in row["constants"].items() if k.startswith("BLOCK")}
    name = f"{row['kernel']} for {row['target']} ({row['group']}: {row['case']}, {row['dtype']})"
    return f"{name} with {tile}: {fact}"


# --- single bars ----------------------------------------------------------------------------------


def more_spills_than(most):
    """Bytes a thread that do not fit its registers."""
    return lambda row: row["spills"] > most


def spills_of_an_epilogue(row):
    """GELU and SiLU of a whole 128x256 tile: a few registers, outside of the loop."""
    whole = row["constants"].get("SUBTILES") == 1 and row["constants"].get("BLOCK_N") == 256
    return row["spills"] > (24 if whole and row["group"] == "activation" else 0)


def spills_at_a_default(row):
    """None, but for two cases, both outside of the loop.

    The naive rung of the convolution keeps two of its addresses on the stack with triton 3.6.0. By
    TMA on sm_100, GELU and SiLU lack a few registers in the epilogue of the largest tiles.
    """
    smooth = row["constants"].get("ACTIVATION") not in (None, "relu")
    if row["kernel"] == "conv2d_direct_kernel":
        return row["spills"] > 8
    return row["spills"] > 24 * (smooth and row["tma"] and row["target"] == "sm_100")


def too_much_shared_memory(row):
    return row["shared"] > SHARED[row["target"]] and not is_too_large(row)


def is_too_large(row):
    """For AMD's 64 KiB the largest tiles of two lessons are too large: a sweep prunes them."""
    largest = row["group"] in ("matmul", "conv2d") and row["constants"].get("BLOCK_N") == 256
    return largest and row["target"] == "gfx942" and row["shared"] > SHARED["gfx942"]


def no_tensor_cores(row):
    """Of a product; float32 in full has none."""
    full = row["dtype"] == "float32" and row["constants"].get("PRECISION") == "ieee"
    return row["dots"] and not row["tensor_cores"] and not full


def longer_than(most):
    """Instructions of one step of the loop."""
    return lambda row: row["loop_instructions"] > most


def not_by_tma(row):
    return not row["tma"] or row["load_bytes"] != 16


def stores_other_than(size):
    """Bytes a thread of the narrowest store; `size` may depend on the row."""
    return lambda row: row["store_bytes"] != (size(row) if callable(size) else size)


def columns(row):
    """How many columns wgmma has for a tile: its pixels, where those are the columns."""
    constants = row["constants"]
    for letters in ("NPQ", "NHW"):
        names = [f"TILE_{x}" for x in letters]
        if names[1] in constants:
            a, b, c = (constants[name] for name in names)
            return a * b * c
    return constants["BLOCK_N"]


def narrow(row):
    return columns(row) < 128


def wgmma(core="HGMMA", shape="64x{}x", most=256):
    """The instructions are not as wide as the tile, or as `most` where they cannot be wider."""
    want = lambda row: f"{core}.{shape.format(min(columns(row), most))}"  # noqa: E731
    return lambda row: row["tensor_core"] is None or want(row) not in row["tensor_core"]


OVERLAPPING = {  # what keeps Hopper's tensor cores busy
    "wgmma is narrower than the tile": wgmma(),
    "an operand is in registers": lambda row: row["operands"] != "shared",
    "each wgmma waits for the last": lambda row: row["serialised"],
    "no loads a step ahead": lambda row: not row["ahead"],
}


# --- special bars ---------------------------------------------------------------------------------


def narrow_pointer_loads(row):
    """Of conv2d's portable kernel: 16 bytes, or all that a thread has of the smaller operand."""
    m, n, k = (row["constants"][f"BLOCK_{x}"] for x in "MNK")
    threads = row["options"]["num_warps"] * (64 if row["target"] == "gfx942" else 32)
    item = 4 if row["dtype"] == "float32" else 2
    return row["load_bytes"] < min(16, min(m, n) * k * item // threads)


def long_pointer_loop(row):
    """Of its widest tile."""
    wide = tuple(row["constants"][f"BLOCK_{x}"] for x in "MNK") == (128, 256, 64)
    return wide and row["loop_instructions"] > 160


def programs_do_not_fit(row):
    """As many on an SM as the tile says. The system has 1 KiB of each one's shared memory."""
    programs = row["tile"]["PROGRAMS_PER_SM"]
    threads = 32 * row["options"]["num_warps"]
    shared = (row["shared"] + KIB) * programs > 228 * KIB
    return shared or row["registers"] * threads * programs > 65536


# The loads and stores that may be narrower than 16 bytes, and why. Those of 8 bytes may be.
FEW = {
    # A bias of 16 channels has fewer partial sums than four for each thread.
    "sum_partials_kernel": "load of 2 x 4 bytes",
    # The place of a maximum is one byte for each pixel of y, which is two or four.
    "max_pool2d_kernel": "store of 8 x 1 bytes",
    "max_pool2d_backward_kernel": "load of 8 x 1 bytes",
    "unpool_kernel": "load of 8 x 1 bytes",
    # float32's tile has four channels a thread, which are 8 bytes in 16-bit.
    "conv2d_depthwise_kernel": ("load of 4 x 2 bytes", "store of 4 x 2 bytes"),
}
SIXTEEN_CHANNELS = dict(BLOCK_M=32, BLOCK_N=64, num_warps=4)  # of pool.py: not for float32


def narrow_accesses(row):
    """A load or a store of a tile takes fewer than 16 bytes at a time."""
    for access, widths in row["accesses"]:
        least = 8 if access.startswith(FEW.get(row["kernel"], "nothing")) else 16
        if not widths or min(widths) < least:
            return True
    return False


def spills_of_a_tile_for_its_dtype(row):
    """Two tiles are for 16 bits alone: eight channels a thread are too many in float32."""
    full, tile = row["dtype"] == "float32", row["tile"]
    if full and "pool" in row["kernel"] and tile == SIXTEEN_CHANNELS:
        return False
    if full and "depthwise" in row["kernel"] and tile != conv2d_depthwise.DEFAULT[4]:
        return False
    return row["spills"] > 0


# What an H200 can issue while it moves 16 bytes for each thread of a warp: 4 instructions a clock
# and SM, at 132 SMs of 1.755 GHz, against 512 bytes at 4.8 TB/s.
SLOTS = 4 * 512 / (4.8e12 / 132 / 1.755e9)


def no_time_for_the_memory(row):
    """More instructions than an H200 can issue meanwhile, of a kernel that has no loop.

    A thread that loads and stores once (of the tiles, one in 16-bit) has nothing to spread over
    what it does first. The forward of the cross-entropy and im2col are over, as their lessons say.
    """
    cases = ("bias_relu", "softmax", "SGD", "AdamW", "SGD of copies", "AdamW of copies")
    if row["case"] not in cases or row["dtype"] != "bfloat16":
        return False
    if row["loop_instructions"] is not None or row["moved"] < 64:
        return False
    return row["instructions"] * 16 / row["moved"] > SLOTS


def no_time_for_the_image(row):
    """A step of a depthwise convolution and its share of what comes before, in its default tile.

    A thread has 8 outputs, a warp 256: they are 512 bytes, and stride^2 as many are read.
    """
    tile = row["tile"]
    if tile != conv2d_depthwise.DEFAULT[2] or row["dtype"] != "bfloat16":
        return False
    stride = 2 if row["case"].endswith("stride 2") else 1
    steps = tile["ROWS"] // tile["PATCH_P"]
    before = row["instructions"] - row["loop_instructions"]
    outputs = tile["BLOCK_M"] * tile["BLOCK_N"] / tile["num_warps"] / 256
    slots = (row["loop_instructions"] + before / steps) / outputs
    return slots >= SLOTS * (1 + stride**2)


# --- the table ------------------------------------------------------------------------------------

FITS = {"too much shared memory": too_much_shared_memory}
HOPPER, BLACKWELL = ("sm_90",), ("sm_100",)
OTHERS = ("sm_80", "sm_100", "gfx942")

BARS = [
    Bars(("default",), None, None, {
        **FITS,
        "spills": spills_at_a_default,
        "no tensor cores": no_tensor_cores,
    }),
    Bars(("tiles",), None, HOPPER, FITS),  # a sweep may try what spills
    Bars(("matmul", "activation"), ("matmul_tma_kernel",), HOPPER, {
        **FITS, **OVERLAPPING,
        "spills": spills_of_an_epilogue,
        "a narrow tile": narrow,
        "not by TMA": not_by_tma,
        "narrow stores": stores_other_than(16),
        "a long loop": longer_than(100),
    }),
    Bars(("matmul",), ("matmul_kernel", "matmul_tma_kernel"), OTHERS, {
        **FITS,
        "spills": more_spills_than(0),
        "no tensor cores": no_tensor_cores,
    }),
    Bars(("conv2d",), None, None, {
        **FITS,
        # The naive rung keeps two of its addresses on the stack with triton 3.6.0.
        "spills": lambda row: row["spills"] > 8 * (row["kernel"] == "conv2d_direct_kernel"),
        "no tensor cores": no_tensor_cores,
    }),
    Bars(("conv2d", "activation"), ("conv2d_tma_kernel",), None, {
        "a narrow tile": narrow,
        "not by TMA": not_by_tma,
        "narrow stores": stores_other_than(16),
    }),
    Bars(("conv2d", "activation"), ("conv2d_tma_kernel",), HOPPER, {
        **OVERLAPPING,
        "a long loop": longer_than(115),
    }),
    Bars(("conv2d",), ("conv2d_kernel",), None, {"narrow loads": narrow_pointer_loads}),
    Bars(("conv2d",), ("conv2d_kernel",), HOPPER, {"a long loop": long_pointer_loop}),
    Bars(("conv2d",), ("conv2d_pack_kernel",), None, {
        "narrow stores": stores_other_than(16),  # its loads are of a pixel's 3 channels, each
    }),
    Bars(("conv2d",), ("conv2d_pack_filter_kernel",), None, {
        # A first layer has 16 channels: two a thread, and 32 KiB in all.
        "narrow stores": lambda row: row["store_bytes"]
        < (4 if row["constants"]["BLOCK_N"] == 16 else 16),
    }),
    Bars(("input grad",), None, HOPPER, {**FITS, "spills": more_spills_than(0)}),
    Bars(("input grad",), ("conv2d_input_grad_tma_kernel",), HOPPER, {
        **OVERLAPPING,
        "a narrow tile": narrow,
        "not by TMA": not_by_tma,
        # through a ReLU the sums are stored, too
        "narrow stores": stores_other_than(lambda row: 4 if row["constants"]["RELU"] else 16),
        "a long loop": longer_than(110),
    }),
    Bars(("input grad",), None, BLACKWELL, {
        **FITS,
        # Through a ReLU one tile keeps four registers on the stack, outside of its loop.
        "spills": lambda row: row["spills"] > 16 * ("ReLU" in row["case"]),
    }),
    Bars(("input grad",), ("conv2d_input_grad_tma_kernel",), BLACKWELL, {
        "no tensor cores": lambda row: not row["tensor_cores"],
    }),
    Bars(("weight grad",), None, None, {
        **FITS,
        # For sm_100 triton 3.9.0 keeps two addresses of some tiles on the stack.
        "spills": lambda row: row["spills"] > 16 * (row["target"] == "sm_100"),
        "not by TMA": not_by_tma,
        "no tensor cores": lambda row: not row["tensor_cores"],
    }),
    Bars(("weight grad",), None, HOPPER, {
        **OVERLAPPING,
        "loads of the sum of dy are waited for":
            lambda row: row["constants"]["HAS_BIAS"] and row["waits"],
        "a long loop":
            lambda row: row["loop_instructions"] > (160 if row["constants"]["WINDOWS"] else 120),
        "an SM has no room for its programs": programs_do_not_fit,
    }),
    Bars(("scaled", "activation"), ("scaled_matmul_tma_kernel",), HOPPER, {
        **FITS, **OVERLAPPING,
        "spills": spills_of_an_epilogue,
        "not by TMA": lambda row: not row["tma"],
        # int8 has no wgmma wider than 128 here: a step of 128x256 is eight of them, not four
        "wgmma is narrower than the tile": lambda row: wgmma(*(
            ("QGMMA", "64x{}x32") if "float8" in row["dtype"] else ("IGMMA", "64x{}x32", 128)
        ))(row),
        "a long loop": lambda row: row["loop_instructions"]
            > (110 if row["dtype"] == "int8" and row["tile"]["BLOCK_N"] > 128 else 100),
    }),
    Bars(("activation",), None, HOPPER, {
        **FITS,
        "spills": spills_of_an_epilogue,
        "no tensor cores": no_tensor_cores,
    }),
    Bars(("activation",), ("bias_activation_kernel", "bias_activation_backward_kernel"), HOPPER, {
        "narrow accesses": narrow_accesses,
    }),
    Bars(("memory",), None, HOPPER, {
        "spills": spills_of_a_tile_for_its_dtype,
        "narrow accesses": narrow_accesses,
        "no time for the memory": no_time_for_the_memory,
    }),
    Bars(("memory",), ("conv2d_depthwise_kernel",), HOPPER, {
        "no time for the memory": no_time_for_the_image,
    }),
]  # fmt: skip

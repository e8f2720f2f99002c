"""The input gradient by TMA (tensor memory accelerator): conv2d_tma.py with its taps turned round.

    dx[n,c,h,w] = sum over k,r,s of dy[n,k,p,q] * weight[k,c,r,s]
                  where p = (h + pad - r*dil) / stride is a row of dy, and q likewise

conv2d_input_grad.py derives this, and sorts the pixels of dx into classes: those of one class take
the same taps. Here TMA fetches boxes of dy, and fills in zeros where a box sticks out of dy.

        filters k          pixels of dy        pixels of dx
        +-------+          +---+---+           +---+---+
      c | ====> |   x    k |   v   |   =     c |   #   |     # one tile: BLOCK_N channels x a box of
        +-------+          +---+---+           +---+---+       BLOCK_M pixels of one class

    for each tile of a program, one after the other:
        acc = 0                                                    [BLOCK_N, BLOCK_M]
        for each tap (r, s) of the class:
            for each block of filters k:                           one step
                acc += weight[k, c, r, s]^T @ dy[box shifted by the tap, k]^T
        dx[box, c] = acc^T

The forward of conv2d_tma.py differs in four points:

1. The filter. Here it is read as it lies in channels_last memory, as [taps, K, C], and transposed.
   This costs nothing: 16-bit tensor cores read both orders from shared memory. It is not flipped.
   Instead, the next tap of the filter reads a box of dy that is further back.
2. Stride 1. This is the forward with dy in place of x, and with padding and dilation negated.
3. A stride. Each class is a convolution of stride 1 with its own taps, so no zeros are put between
   the rows of dy. At stride 2, dx is seen as [N, H/2, 2, W/2, 2*C], which is the same memory. A box
   of one class is a box of that.
4. A ReLU. Where x = relu(z + bias), the kernel can go on to dz and dbias while the tile is in
   registers. This saves a pass that reads dx and x and writes dz.

What limits it: tensor cores. The FLOPs and bytes are in conv2d_input_grad.py, and what the compiler
makes of a step is above the kernel.

Read first: conv2d_input_grad.py, conv2d_tma.py.
"""

import functools
import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from tilelab.kernels._launch import Device, descriptor, device_of, launch
from tilelab.kernels._partial_sums import reduce_parts, sum_partials
from tilelab.kernels._tile_facts import Work, fastest_tile
from tilelab.kernels._tiles import cdiv, choose_tile, persistent
from tilelab.kernels.conv2d_tma import (
    FAST_TILES,
    LARGEST,
    Layout,
    Plan,
    corner_of,
    filters_as_they_lie,
    folded_plan,
    packed_filter,
    packed_filters,
    pixel_box,
    pixel_strides,
)


@triton.jit
def _class_of(
    t, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    GCD: tl.constexpr,
):  # fmt: skip
    """Return the t-th class: its first pixel, its first tap, its number of taps, and `up`.

    Tap number j of its pixel number i reads row i + up - j * DIL / GCD of dy. The first classes
    have the most taps.
    """
    STEP: tl.constexpr = STRIDE // GCD
    r0 = t % STEP
    # rest is (h + pad) mod stride. The taps reach STEP of the STRIDE classes; the others come last.
    rest = r0 * DIL % STRIDE + t // STEP
    a = (rest + (STRIDE - PAD % STRIDE)) % STRIDE
    taps = tl.where(t < STEP, (R - r0 + STEP - 1) // STEP, 0)
    return a, r0, taps, (a + PAD - r0 * DIL) // STRIDE


# The tiles are those of the forward. This is what triton 3.6.0 and 3.9.0 compile the largest one
# to: 256 pixels x 128 channels in bfloat16, for sm_90 (Hopper). It was not run.
#
#                            registers       shared memory    instructions
#                            per thread      per program      per step
#     stride 1               154, 154        208 KiB          101, 101
#     stride 1, ReLU         165, 163        208 KiB          101, 101
#     stride 2               154, 154        208 KiB          103, 103
#     stride 2, ReLU         162, 163        208 KiB          103, 103


@triton.jit
def conv2d_input_grad_tma_kernel(
    dy, w, x, dx, sums_ptr, N, ROWS, COLUMNS, C, K,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GCD_H: tl.constexpr, GCD_W: tl.constexpr, PACKED: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of dx in each of its turns: BLOCK_N channels of a box of pixels.

    dy, w, x and dx are descriptors; w is [R*S, K, C] or, if PACKED, [R*S, C, K]. A class has
    N * ROWS * COLUMNS pixels. With RELU it computes dz instead of dx, and sums for dbias.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_H * TILE_W
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    STEP_R: tl.constexpr = STRIDE_H // GCD_H  # The next tap of a class is STEP_R rows further.
    STEP_S: tl.constexpr = STRIDE_W // GCD_W
    UP: tl.constexpr = DIL_H // GCD_H  # It reads dy UP rows further back.
    LEFT: tl.constexpr = DIL_W // GCD_W
    blocks_c = tl.cdiv(C, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    boxes = tl.cdiv(N, TILE_N) * tl.cdiv(ROWS, TILE_H) * tl.cdiv(COLUMNS, TILE_W)
    tiles = boxes * blocks_c * SPLIT_K  # the number of tiles of one class

    # Every second turn runs backwards through the programs. So the program with the longest sum in
    # one turn has the shortest sum in the next one. The last turn may not have a tile for each.
    pid, programs = tl.program_id(0), tl.num_programs(0)
    turns = tiles * CLASSES // programs
    place = tl.where(turns % 2 == 0, pid, programs - 1 - pid)
    turns += (place < tiles * CLASSES % programs).to(tl.int32)
    for turn in tl.range(0, turns):
        tile = turn * programs + tl.where(turn % 2 == 0, pid, programs - 1 - pid)
        t = 0
        # A wave is as many tiles as there are programs. It goes through all classes before the next
        # wave begins, so the L2 cache still has its boxes of dy.
        if CLASSES > 1:
            wave = tile // (programs * CLASSES) * programs
            width = tl.minimum(tiles - wave, programs)
            within = tile % (programs * CLASSES)
            tile = wave + within % width
            t = within // width
        c = tile % blocks_c * BLOCK_N
        box = tile // blocks_c
        part, n, i, j = corner_of(box, N, ROWS, COLUMNS, TILE_N, TILE_H, TILE_W, SPLIT_K)
        # A class shares the last dimension, b * C, with others: no block may reach into theirs. So
        # the last two blocks of a pixel may overlap, and store the same numbers there.
        if STRIDE_W > 1:
            c = tl.minimum(c, C - BLOCK_N)
        a, r0, taps_r, up = _class_of(t // STRIDE_W, R, STRIDE_H, PAD_H, DIL_H, GCD_H)
        b, s0, taps_s, left = _class_of(t % STRIDE_W, S, STRIDE_W, PAD_W, DIL_W, GCD_W)
        p, q = i + up, j + left  # where the first tap reads dy
        steps = taps_r * taps_s * blocks_k  # If no tap reaches the class, its dx is 0.

        # These are the tap of the class and the filters of the first step. The next steps count up
        # from them without an `if`; conv2d_tma.py says why.
        first, last, tap_r, tap_s, k = 0, steps, 0, 0, 0
        if SPLIT_K > 1:
            part_steps = tl.cdiv(steps, SPLIT_K)
            first = part * part_steps
            last = tl.minimum(first + part_steps, steps)
            tap_r = first // blocks_k // tl.maximum(taps_s, 1)
            tap_s = first // blocks_k % tl.maximum(taps_s, 1)
            k = first % blocks_k * BLOCK_K
        acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
        for _ in range(first, last):
            dy_box = dy.load([n, p - tap_r * UP, q - tap_s * LEFT, k])
            tap = (r0 + tap_r * STEP_R) * S + s0 + tap_s * STEP_S
            if PACKED:
                w_tile = tl.reshape(w.load([tap, c, k]), (BLOCK_N, BLOCK_K))
            else:  # The transpose moves nothing: the tensor cores read it so.
                w_tile = tl.reshape(w.load([tap, k, c]), (BLOCK_K, BLOCK_N)).T
            dy_tile = tl.reshape(dy_box, (BLOCK_M, BLOCK_K))
            acc = tl.dot(w_tile, dy_tile.T, acc, input_precision=PRECISION)
            k += BLOCK_K
            done = k >= K
            k = tl.where(done, 0, k)
            tap_s = tl.where(done, tap_s + 1, tap_s)
            done = tap_s >= taps_s
            tap_s = tl.where(done, 0, tap_s)
            tap_r = tl.where(done, tap_r + 1, tap_r)

        # dz is 0 where x <= 0. Past the border x reads as 0, so nothing is added to the sums there.
        # A second kernel adds the sums of all tiles up to dbias.
        if RELU:
            if CLASSES == 1:
                x_box = x.load([n, i, j, c])
            else:
                x_box = x.load([n, i, a, j, b * C + c])
            acc = tl.where(tl.reshape(x_box, (BLOCK_M, BLOCK_N)).T <= 0, 0.0, acc)
            offs_c = c + tl.arange(0, BLOCK_N)
            sums = sums_ptr + (t * boxes + box).to(tl.int64) * C
            tl.store(sums + offs_c, tl.sum(acc, axis=1), mask=offs_c < C)
        # The parts of a sum lie one behind the other: N images each, rounded up to whole boxes.
        n += part * (tl.cdiv(N, TILE_N) * TILE_N)
        out = acc.to(dx.dtype).T
        if CLASSES == 1:
            dx.store([n, i, j, c], tl.reshape(out, (TILE_N, TILE_H, TILE_W, BLOCK_N)))
        else:
            out = tl.reshape(out, (TILE_N, TILE_H, 1, TILE_W, BLOCK_N))
            dx.store([n, i, a, j, b * C + c], out)


@triton.jit
def conv2d_unfold_kernel(
    folded_ptr, dx_ptr, N, C, H, W, rows, columns, depth,
    stride_n, stride_c, stride_h, stride_w,
    FOLD_H: tl.constexpr, FOLD_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels of dx from folded [N, rows, columns, depth].

    It undoes what conv2d_pack_kernel does. No window reads the pixels that folded does not have, so
    their dx is 0.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    w = offs_m % W
    h = offs_m // W % H
    n = offs_m // W // H
    row, a = (h + PAD_H) // FOLD_H, (h + PAD_H) % FOLD_H
    column, b = (w + PAD_W) // FOLD_W, (w + PAD_W) % FOLD_W
    offs = ((n * rows + row) * columns + column) * depth + (a * FOLD_W + b) * C
    mask = (n < N)[:, None] & (c < C)[None, :]
    inside = ((row < rows) & (column < columns))[:, None] & mask
    dx = tl.load(folded_ptr + offs[:, None] + c[None, :], mask=inside, other=0.0)
    out = (n * stride_n + h * stride_h + w * stride_w)[:, None] + (c * stride_c)[None, :]
    tl.store(dx_ptr + out, dx, mask=mask)


# --- Which tensors, which tile --------------------------------------------------------------------


NARROWEST = min(tile["BLOCK_N"] for tiles in FAST_TILES.values() for tile in tiles)


@functools.lru_cache(maxsize=4096)
def make_plan(
    dy_size: tuple, dy_strides: tuple, w_size: tuple, w_strides: tuple, size: tuple,
    stride: tuple, padding: tuple, dilation: tuple, groups: int, item: int,
) -> Plan | None:  # fmt: skip
    """Return the plan for tensors of these sizes and strides, or None if the kernel cannot do them.

    It is a plan of conv2d_tma.py, with dy [N, K, P, Q] in place of x, and dx, of `size`, in place
    of y. Packed filters become [taps, C, K]; others are read as [taps, K, C]. With `fold`, all
    sizes except those of dy are of the folded image. `item` is the number of bytes of an element.
    """
    (N, C, H, W), (K, _, R, S) = size, w_size
    unit = 16 // item
    if groups > 1 or 0 in (*dy_size, *size, R, S) or K % unit:
        return None
    geometry, fold = (*stride, *padding, *dilation), None
    # conv2d_tma.py folds images of fewer than 8 channels, as a first layer has. It makes
    # stride x stride pixels one with as many times the channels. The convolution then has stride 1.
    # The same kernel computes the gradient of the folded image; `_unfold` follows.
    if C < unit and item == 2 and dilation == (1, 1):
        folded = folded_plan(size, w_size, stride, *dy_size[2:], unit)
        if folded is None:
            return None
        (N, H, W, C), (R, S), geometry, fold = folded.x[0], folded.taps, folded.geometry, stride
        size, w_size, stride = (N, C, H, W), (K, C, R, S), (1, 1)
        w_strides = (R * S * C, 1, S * C, C)
    if C % unit or H % stride[0] or W % stride[1] or max(*dy_size, *size, N * H * W) > LARGEST:
        return None
    if stride[1] > 1 and C < NARROWEST:  # A tile would reach into the channels of the next pixel.
        return None
    strides = pixel_strides(dy_size, dy_strides, unit)
    # A descriptor's strides are below 2**40 bytes.
    if strides is None or max(*strides, C * H * W) * item >= 2**40:
        return None
    # TF32 needs both operands contiguous along the sum, and only packed filters are.
    w = filters_as_they_lie(w_size, w_strides, unit) if item == 2 else None
    packed = w is None
    if packed:
        w = packed_filters(C, R * S, K, unit)
    dy = tuple(dy_size[x] for x in (0, 2, 3, 1)), (*strides, 1)
    return Plan((N, H, W, C), dy, fold, w, packed, (R, S), geometry, None)


def plan_for(dy, weight, size, stride, padding, dilation, groups, precision) -> Plan | None:
    """Return the plan for this call, or None if the device or the tensors do not allow one."""
    if len(device_of(dy).kernels) == 1 or (dy.dtype == torch.float32 and precision != "tf32"):
        return None
    if dy.data_ptr() % 16:
        return None
    return make_plan(
        dy.shape, dy.stride(), weight.shape, weight.stride(), tuple(size),
        tuple(stride), tuple(padding), tuple(dilation), groups, dy.element_size(),
    )  # fmt: skip


def _taps_of_classes(taps: int, stride: int, dilation: int) -> list[int]:
    """Return how many taps reach each class of rows, in the kernel's order (`_class_of`)."""
    apart = stride // math.gcd(dilation, stride)
    return [cdiv(taps - t, apart) if t < min(apart, taps) else 0 for t in range(stride)]


@functools.lru_cache(maxsize=4096)
def fast_tile(plan: Plan, item: int, device: Device, relu: bool = False) -> dict | None:
    """Return the tile of FAST_TILES, with its parts, that is fastest by the model."""
    N, H, W, C = plan.size
    K, stride, dilation = plan.x[0][3], plan.geometry[:2], plan.geometry[4:]
    rows, columns = map(_taps_of_classes, plan.taps, stride, dilation)
    classes = [r * s for r in rows for s in columns]
    moved = item * (math.prod(plan.x[0]) + math.prod(plan.w[0]) + math.prod(plan.size))

    def work(tile: dict) -> Iterable[tuple[dict, Work, int]]:
        if "kernel" not in tile:  # It is for the kernel that loads through pointers.
            return
        tn, th, tw = pixel_box(N, H // stride[0], W // stride[1], tile["BLOCK_M"])
        boxes = cdiv(N, tn) * cdiv(H // stride[0], th) * cdiv(W // stride[1], tw)
        tiles, blocks_k = boxes * cdiv(C, tile["BLOCK_N"]), cdiv(K, tile["BLOCK_K"])
        # The classes follow each other without a gap, so a mean of their taps is as good.
        steps = sum(classes) / len(classes) * blocks_k
        its_work = Work(tiles * len(classes), steps, N * H * W * C, moved)
        # A large tile does not fit into shared memory as a float32 partial result. Through a ReLU
        # it does not fit with a float32 box of x either.
        large = tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128
        for parts in (1, 2, 4, 8, 16):
            one = parts == 1 and not (large and relu and item == 4)
            several = len(classes) == 1 and not (relu or large) and parts * 4 <= steps
            if one or (parts > 1 and several):
                yield tile | dict(SPLIT_K=parts), its_work, parts

    kind = "fp16" if item == 2 else "tf32"
    return fastest_tile(device, "conv2d_input_grad", kind, work)


UNFOLD_TILE = dict(BLOCK_M=256, num_warps=4)


def _unfold(plan, folded, dx, padding):
    """Compute dx [N, C, H, W] from its folded form."""
    (N, C, H, W), (_, rows, columns, depth) = dx.shape, plan.size
    tile = choose_tile("conv2d_unfold", dx, {dx.itemsize: UNFOLD_TILE}, M=N * H * W)
    launch(
        conv2d_unfold_kernel, (cdiv(N * H * W, tile["BLOCK_M"]),),
        folded, dx, N, C, H, W, rows, columns, depth, *dx.stride(), *plan.fold, *padding,
        BLOCK_N=triton.next_power_of_2(C), **tile,
    )  # fmt: skip


def conv2d_input_grad_tma(plan, dy, weight, x, dx, dbias, tile, precision, padding):
    """Launch the fast kernel, after what packs its input, and before what adds up its results.

    dx [N, C, H, W] is channels_last, and so is x. If x is given, it is relu(z + bias). Then dx
    receives dz, and dbias [C] the gradient of that bias.

    Raises:
        ValueError: x is given, and the tile has its sum in parts.
    """
    relu, parts = x is not None, tile["SPLIT_K"]
    if relu and parts > 1:
        raise ValueError(f"through a ReLU the tile must have SPLIT_K=1, got {tile}")
    result = dx
    if plan.fold is not None:
        weight = packed_filter(plan, plan.w[0], weight)
        N, H, W, C = plan.size
        dx = torch.empty(N, H, W, C, dtype=dy.dtype, device=dy.device)
    packed = plan.packed_w or weight.data_ptr() % 16 != 0
    how = _layout(plan, tuple(tile.items()), device_of(dy).sms, dy.element_size(), packed)
    if packed:
        weight = packed_filter(plan, how.w[0], weight.transpose(0, 1))
    out, sums = dx, None
    if parts > 1:
        out = torch.empty(how.out[0], dtype=torch.float32, device=dy.device)
    if relu:
        sums = torch.empty(how.boxes, plan.size[3], dtype=torch.float32, device=dy.device)
    launch(
        conv2d_input_grad_tma_kernel, (how.programs,),
        descriptor(dy, *plan.x, how.box), descriptor(weight, *how.w, how.w_box),
        descriptor(x, *how.out, how.out_box) if relu else None,
        descriptor(out, *how.out, how.out_box), sums, *how.sizes, *plan.taps, *plan.geometry,
        RELU=relu, PRECISION=precision, **how.meta,
    )  # fmt: skip
    if relu:
        sum_partials(sums, dbias)
    if parts > 1:
        N, H, W, C = plan.size
        reduce_parts(out, None, None, dx, N * H * W, C, how.out[0][0] // parts * H * W, parts)
    if plan.fold is not None:
        _unfold(plan, dx, result, padding)


@functools.lru_cache(maxsize=4096)
def _layout(plan: Plan, items: tuple, sms: int, item: int, packed: bool) -> Layout:
    tile = dict(items)
    (N, H, W, C), K = plan.size, plan.x[0][3]
    m, n, k, parts = (tile[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    a, b, _, _, dil_h, dil_w = plan.geometry
    if b > 1:  # As in choose_tile, no block is larger than what it covers.
        n = min(n, 1 << (C.bit_length() - 1))
    rows, columns = H // a, W // b
    tn, th, tw = pixel_box(N, rows, columns, m)
    boxes_n = cdiv(N, tn)
    boxes = boxes_n * cdiv(rows, th) * cdiv(columns, tw) * a * b
    images = N if parts == 1 else parts * boxes_n * tn
    out, out_box = ((images, H, W, C), (H * W * C, W * C, C, 1)), [tn, th, tw, n]
    if a * b > 1:
        out = (images, rows, a, columns, b * C), (H * W * C, a * W * C, W * C, b * C, 1)
        out_box = [tn, th, 1, tw, n]
    return Layout(
        persistent(tile, boxes * cdiv(C, n) * parts, sms), boxes,
        (N, rows, columns, C, K), [tn, th, tw, k],
        packed_filters(C, plan.w[0][0], K, 16 // item) if packed else plan.w,
        [1, n, k] if packed else [1, k, n], out, out_box,
        dict(
            GCD_H=math.gcd(dil_h, a), GCD_W=math.gcd(dil_w, b), PACKED=packed,
            TILE_N=tn, TILE_H=th, TILE_W=tw, BLOCK_N=n, BLOCK_K=k, SPLIT_K=parts,
            num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        ),
    )  # fmt: skip

"""The input gradient by TMA, the tensor memory accelerator: the forward, turned round.

What conv2d_input_grad.py gathers, with the tiles of conv2d_tma.py: a unit fetches boxes of dy and
fills in zeros where they stick out, and acc = W^T dy^T is [channels, pixels]. What is different:

  the filter   is read as it lies in channels_last memory: of [taps, K, C] a tile of BLOCK_K
               filters and BLOCK_N channels. It is the first operand transposed, which costs
               nothing, since 16-bit tensor cores read both orders out of shared memory. Nor is it
               flipped: a step to the next tap of the filter is a step back in dy
  stride 1     is then the forward with dy for x, and with padding and dilation negated
  a stride     makes a convolution of stride 1 of each class of pixels, by the taps of its own.
               Pixel h = i*stride + a of class a takes its j-th tap from p = i + up - j*dil/g,
               where up depends on a alone: there are no zeros between the rows of dy. A box of
               one class of dx is a box of [N, H/2, 2, W/2, 2*C], which is the same memory
  order        the first tap r0 names a class, r0*dil mod stride, and so those with most taps come
               first. As many tiles as there are programs go through all classes before the next
               ones do, so that their boxes of dy come out of the L2 cache; and every second turn
               runs backwards through the programs: who had the longest sum has the shortest next
  ReLU         where x = relu(z + bias), the gradient of z is dx where x > 0, and that of the bias
               its sum over the pixels. The tile is still in registers: it takes its box of x, and
               a pass that reads dx and x and writes dz is saved

One launch stores every pixel, those that no tap reaches too. A filter of one pixel at stride 1 is
a matmul; but not with a ReLU, which a matmul does not end with.

Images of fewer than 8 channels, which only the first layer of a network has: conv2d_tma.py makes
stride x stride pixels one, with so many times the channels, and the convolution one of stride 1.
Its input gradient is that of the folded image, by the same kernel, and then unfolded.

The tiles are the forward's. What triton 3.6.0 and 3.9.0 make of the largest, 256 pixels of 128
channels, in bfloat16 for sm_90; not run:

                     registers   shared memory   instructions a step
  stride 1           154, 154      208 KiB            101, 101
  + ReLU             165, 163      208 KiB            101, 101
  stride 2           154, 154      208 KiB            103, 103
  + ReLU             162, 163      208 KiB            103, 103

Read first: conv2d_input_grad.py, conv2d_tma.py.
"""

import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from tilelab.kernels._cost_model import busiest_sm
from tilelab.kernels._launch import descriptor, device_of, launch
from tilelab.kernels._partial_sums import reduce_parts, sum_partials
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
    """Of the t-th class: its first pixel, its first tap, how many, and the output of the two."""
    STEP: tl.constexpr = STRIDE // GCD
    r0 = t % STEP
    rest = r0 * DIL % STRIDE + t // STEP  # (h + pad) mod stride; from STEP on, no tap has it
    a = (rest + (STRIDE - PAD % STRIDE)) % STRIDE
    taps = tl.where(t < STEP, (R - r0 + STEP - 1) // STEP, 0)
    return a, r0, taps, (a + PAD - r0 * DIL) // STRIDE


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

    dy, w, x and dx are descriptors: w is of [R*S, K, C] or, PACKED, of [R*S, C, K]. A class has
    N * ROWS * COLUMNS pixels. RELU masks dx where x is not positive, and stores the sums of each
    tile. With SPLIT_K > 1, dx is of partial sums: [SPLIT_K * N, ...], N rounded up to boxes.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_H * TILE_W
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    STEP_R: tl.constexpr = STRIDE_H // GCD_H  # from one tap of a class to its next
    STEP_S: tl.constexpr = STRIDE_W // GCD_W
    UP: tl.constexpr = DIL_H // GCD_H  # and from its output to the next one's
    LEFT: tl.constexpr = DIL_W // GCD_W
    blocks_c = tl.cdiv(C, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    boxes = tl.cdiv(N, TILE_N) * tl.cdiv(ROWS, TILE_H) * tl.cdiv(COLUMNS, TILE_W)
    tiles = boxes * blocks_c * SPLIT_K  # of a class

    # Every second turn runs backwards through the programs; the last one has fewer tiles.
    pid, programs = tl.program_id(0), tl.num_programs(0)
    turns = tiles * CLASSES // programs
    place = tl.where(turns % 2 == 0, pid, programs - 1 - pid)
    turns += (place < tiles * CLASSES % programs).to(tl.int32)
    for turn in tl.range(0, turns):
        tile = turn * programs + tl.where(turn % 2 == 0, pid, programs - 1 - pid)
        t = 0
        if CLASSES > 1:  # a wave of as many tiles as programs, of one class after the other
            wave = tile // (programs * CLASSES) * programs
            width = tl.minimum(tiles - wave, programs)
            within = tile % (programs * CLASSES)
            tile = wave + within % width
            t = within // width
        c = tile % blocks_c * BLOCK_N
        box = tile // blocks_c
        part, n, i, j = corner_of(box, N, ROWS, COLUMNS, TILE_N, TILE_H, TILE_W, SPLIT_K)
        if STRIDE_W > 1:  # not into the next pixel's: the last two blocks may share channels
            c = tl.minimum(c, C - BLOCK_N)
        a, r0, taps_r, up = _class_of(t // STRIDE_W, R, STRIDE_H, PAD_H, DIL_H, GCD_H)
        b, s0, taps_s, left = _class_of(t % STRIDE_W, S, STRIDE_W, PAD_W, DIL_W, GCD_W)
        p, q = i + up, j + left  # of the first tap
        steps = taps_r * taps_s * blocks_k

        # The first step: which tap of the class, and which filters. The next ones are counted.
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
            else:  # the transpose stays as it lies in shared memory
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

        if RELU:
            if CLASSES == 1:
                x_box = x.load([n, i, j, c])
            else:
                x_box = x.load([n, i, a, j, b * C + c])
            acc = tl.where(tl.reshape(x_box, (BLOCK_M, BLOCK_N)).T <= 0, 0.0, acc)
            offs_c = c + tl.arange(0, BLOCK_N)
            sums = sums_ptr + (t * boxes + box).to(tl.int64) * C
            tl.store(sums + offs_c, tl.sum(acc, axis=1), mask=offs_c < C)
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
    """One program stores BLOCK_M pixels of dx: what conv2d_pack_kernel does, undone.

    They come out of folded [N, rows, columns, depth]. Pixels beyond it are those that no window
    reads.
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
    """The plan for tensors of these sizes and strides; None if the kernel cannot do them.

    It is that of conv2d_tma.py with dy [N, K, P, Q] in the place of x, and dx, of `size`, in that
    of y. Filters that are packed become [taps, C, K], others are read as [taps, K, C]. With `fold`
    all sizes are those of the folded image, but for dy's.
    """
    (N, C, H, W), (K, _, R, S) = size, w_size
    unit = 16 // item
    if groups > 1 or 0 in (*dy_size, *size, R, S) or K % unit:
        return None
    geometry, fold = (*stride, *padding, *dilation), None
    if C < unit and item == 2 and dilation == (1, 1):
        folded = folded_plan(size, w_size, stride, *dy_size[2:], unit)
        if folded is None:
            return None
        (N, H, W, C), (R, S), geometry, fold = folded.x[0], folded.taps, folded.geometry, stride
        size, w_size, stride = (N, C, H, W), (K, C, R, S), (1, 1)
        w_strides = (R * S * C, 1, S * C, C)
    if C % unit or H % stride[0] or W % stride[1] or max(*dy_size, *size, N * H * W) > LARGEST:
        return None
    if stride[1] > 1 and C < NARROWEST:  # a tile would reach into the channels of the next pixel
        return None
    strides = pixel_strides(dy_size, dy_strides, unit)
    if strides is None or max(*strides, C * H * W) * item >= 2**40:  # what a descriptor's can be
        return None
    w = filters_as_they_lie(w_size, w_strides, unit) if item == 2 else None
    packed = w is None  # and for TF32, whose operands both have to be contiguous along the sum
    if packed:
        w = packed_filters(C, R * S, K, unit)
    dy = tuple(dy_size[x] for x in (0, 2, 3, 1)), (*strides, 1)
    return Plan((N, H, W, C), dy, fold, w, packed, (R, S), geometry, None)


def plan_for(dy, weight, size, stride, padding, dilation, groups, precision) -> Plan | None:
    """The plan for this call, if the device and the tensors have one."""
    if len(device_of(dy).kernels) == 1 or (dy.dtype == torch.float32 and precision != "tf32"):
        return None
    if dy.data_ptr() % 16:
        return None
    return make_plan(
        dy.shape, dy.stride(), weight.shape, weight.stride(), tuple(size),
        tuple(stride), tuple(padding), tuple(dilation), groups, dy.element_size(),
    )  # fmt: skip


def _taps_of_classes(taps: int, stride: int, dilation: int) -> list[int]:
    """How many taps reach each class of rows, in the kernel's order."""
    apart = stride // math.gcd(dilation, stride)
    return [cdiv(taps - t, apart) if t < min(apart, taps) else 0 for t in range(stride)]


@functools.lru_cache(maxsize=4096)
def fast_tile(plan: Plan, item: int, sms: int, relu: bool = False) -> dict:
    """Of FAST_TILES the one, and the parts, with which the busiest SM should be done first."""
    N, H, W, C = plan.size
    K, stride, dilation = plan.x[0][3], plan.geometry[:2], plan.geometry[4:]
    rows, columns = map(_taps_of_classes, plan.taps, stride, dilation)
    classes = [r * s for r in rows for s in columns]

    def clocks(tile: dict) -> float:
        tn, th, tw = pixel_box(N, H // stride[0], W // stride[1], tile["BLOCK_M"])
        boxes = cdiv(N, tn) * cdiv(H // stride[0], th) * cdiv(W // stride[1], tw)
        tiles, blocks_k = boxes * cdiv(C, tile["BLOCK_N"]), cdiv(K, tile["BLOCK_K"])
        if len(classes) == 1:
            return busiest_sm(tile, tiles, classes[0] * blocks_k, N * H * W * C, item, sms)
        total, (waves, rest) = 0.0, divmod(tiles, sms)
        for t, taps in enumerate(classes):  # the last wave's classes follow without a gap
            turns = waves + cdiv((t + 1) * rest, sms) - cdiv(t * rest, sms)
            total += busiest_sm(tile, turns * sms, taps * blocks_k, 0, item, sms)
        return total

    def fits(tile: dict) -> bool:
        """In float32 two of the largest do not fit: a tile of parts, or one and the box of x."""
        parts, large = tile["SPLIT_K"], tile["BLOCK_M"] * tile["BLOCK_N"] > 128 * 128
        if parts == 1:
            return not (large and relu and item == 4)
        steps = classes[0] * cdiv(K, tile["BLOCK_K"])  # parts have four at least
        return len(classes) == 1 and not (relu or large) and parts * 4 <= steps

    tiles = itertools.product(FAST_TILES[item], (1, 2, 4, 8, 16))
    tiles = [tile | dict(SPLIT_K=parts) for tile, parts in tiles]
    return min(filter(fits, tiles), key=clocks)


UNFOLD_TILE = dict(BLOCK_M=256, num_warps=4)


def _unfold(plan, folded, dx, padding):
    """Store dx [N, C, H, W] out of its folded form."""
    (N, C, H, W), (_, rows, columns, depth) = dx.shape, plan.size
    tile = choose_tile("conv2d_unfold", dx.dtype, {dx.itemsize: UNFOLD_TILE}, M=N * H * W)
    launch(
        conv2d_unfold_kernel, (cdiv(N * H * W, tile["BLOCK_M"]),),
        folded, dx, N, C, H, W, rows, columns, depth, *dx.stride(), *plan.fold, *padding,
        BLOCK_N=triton.next_power_of_2(C), **tile,
    )  # fmt: skip


def conv2d_input_grad_tma(plan, dy, weight, x, dx, dbias, tile, precision, padding):
    """Launch the fast kernel, with what has to be packed before and added up after it.

    dx [N, C, H, W] is channels_last, and so is x. With x, it is the gradient through the ReLU that
    x came out of, and dbias that of its bias.

    Raises:
        ValueError: with x, a tile whose sum is in parts.
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
    if b > 1:  # as in choose_tile: no block is larger than what it covers
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

"""FLOPs of one instruction of a compiled program: matrix products, convolutions, and splash attention by its blocks."""

import functools
import json
import math
import re

import numpy as np

from tele_jax.aot import hlo
from tele_jax.aot.hlo import Instruction


def dot_flops(i: Instruction, left: hlo.Array) -> float:
    """Two for every product that is summed."""
    contracted = [int(d) for d in re.findall(r"\d+", i.attribute("lhs_contracting_dims") or "")]
    return 2.0 * math.prod(i.shape[0].dims) * math.prod(left.dims[d] for d in contracted)


def convolution_flops(i: Instruction, left: hlo.Array, right: hlo.Array) -> float:
    """Two for every product of two elements that are there: padding and the holes of dilation do not count.

    TPU programs write matrix products as convolutions, batch dimensions as spatial ones with padding or dilation.
    """
    labels = re.match(r"([\w?]+)_([\w?]+)->([\w?]+)", i.attribute("dim_labels"))
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    window = _window(i, sum(c.isdigit() for c in kernel))
    products = 1.0
    for d, dimension in enumerate(window):
        size_in, size_out = left.dims[inputs.index(str(d))], i.shape[0].dims[outputs.index(str(d))]
        products *= _valid(size_in, size_out, *dimension)
    features = right.dims[kernel.index("i")] * i.shape[0].dims[outputs.index("f")]
    return 2.0 * products * features * i.shape[0].dims[outputs.index("b")]


def _window(i: Instruction, dimensions: int) -> list[tuple[int, int, int, int, int]]:
    """Per spatial dimension: size, stride, padding before, dilation of the input, dilation of the kernel."""
    text = i.attribute("window") or "{}"
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))
    split = lambda key, default: fields[key].split("x") if key in fields else [default] * dimensions  # noqa: E731
    return [
        (int(size), int(stride), int(pad.split("_")[0]), int(left), int(right))
        for size, stride, pad, left, right in zip(
            split("size", "1"),
            split("stride", "1"),
            split("pad", "0_0"),
            split("lhs_dilate", "1"),
            split("rhs_dilate", "1"),
            strict=True,
        )
    ]


@functools.lru_cache(maxsize=4096)
def _valid(size_in: int, size_out: int, size: int, stride: int, pad: int, dilate_in: int, dilate_kernel: int) -> int:
    """How many (kernel, output) positions of one dimension meet an element of the input."""
    total, outputs = 0, np.arange(size_out) * stride - pad
    for k in range(size):
        at = outputs + k * dilate_kernel
        total += int(np.sum((at >= 0) & (at <= (size_in - 1) * dilate_in) & (at % dilate_in == 0)))
    return total


def attention_flops(i: Instruction, operands: list[Instruction]) -> float:
    """FLOPs of a splash attention kernel with a causal mask, by the blocks that it visits; 0 for any other call.

    Two matrix products a block forward, three for the gradient of q alone, four for those of k and v, five for all.
    """
    match = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)
    metadata = re.search(r'"xprof_metadata":"(\{.*?\})"', i.attributes)
    if match is None or metadata is None:
        return 0.0
    blocks = json.loads(metadata[1].replace('\\"', '"'))
    phase = match[1]
    arrays = [o.shape[0] for o in operands if len(o.shape) == 1 and len(o.shape[0].dims) >= 3]
    arrays = [a for a in arrays if a.dtype in ("bf16", "f32", "f16")]
    queries, keys = arrays[0].dims, arrays[1].dims  # [..., heads, S, head_dim] and [..., kv heads, T, head_dim]
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[phase]
    block_q, block_kv = blocks[f"block_q{suffix}"], blocks[f"block_kv{suffix}"]
    visited = sum(
        min(math.ceil((row + 1) * block_q / block_kv), keys[-2] // block_kv) for row in range(queries[-2] // block_q)
    )
    fused = phase == "dkv" and any(len(a.dims) == len(queries) + 1 for a in i.shape)
    products = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[phase]
    return products * 2.0 * visited * block_q * block_kv * queries[-1] * math.prod(queries[:-2])

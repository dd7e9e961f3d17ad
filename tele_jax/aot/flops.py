"""FLOPs of single instructions: matrix products, convolutions, attention kernels, and what their padding takes."""

import functools
import json
import math
import re
from collections.abc import Sequence

import numpy as np

from tele_jax.aot import hlo
from tele_jax.aot.hlo import Instruction


def dot_flops(i: Instruction, left: hlo.Array) -> float:
    """FLOPs of a matrix product: two for every product that is summed."""
    contracted = [int(d) for d in re.findall(r"\d+", i.attribute("lhs_contracting_dims") or "")]
    return 2.0 * math.prod(i.shape[0].dims) * math.prod(left.dims[d] for d in contracted)


def convolution_flops(i: Instruction, left: hlo.Array, right: hlo.Array) -> float:
    """FLOPs of a convolution: two for every product of elements; padding and the holes of dilation do not count.

    TPU programs write matrix products as convolutions, batch dimensions as spatial ones with padding or dilation.
    """
    inputs, kernel, outputs = re.split("_|->", i.attribute("dim_labels") or "")
    window = _window(i, sum(c.isdigit() for c in kernel))
    products = 1.0
    for d, dimension in enumerate(window):
        size_in, size_out = left.dims[inputs.index(str(d))], i.shape[0].dims[outputs.index(str(d))]
        products *= _valid(size_in, size_out, *dimension)
    features = right.dims[kernel.index("i")] * i.shape[0].dims[outputs.index("f")]
    return 2.0 * products * features * i.shape[0].dims[outputs.index("b")]


def dot_sizes(i: Instruction, left: hlo.Array, right: hlo.Array) -> tuple[int, int, int]:
    """Returns (rows, contracted, columns) of each of the matrix products that a dot is."""
    contracted = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", i.attribute("lhs_contracting_dims") or ""))
    batch = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", i.attribute("lhs_batch_dims") or ""))
    rows, columns = (math.prod(array.dims) // max(contracted * batch, 1) for array in (left, right))
    return rows, contracted, columns


def convolution_sizes(i: Instruction, left: hlo.Array, right: hlo.Array) -> tuple[int, int, int] | None:
    """Returns the sizes of `dot_sizes` for a convolution without a window, None for one with: which of its dimensions
    the compiler puts together is not written.
    """
    _, kernel, _ = re.split("_|->", i.attribute("dim_labels") or "")
    contracted, columns = (right.dims[kernel.index(letter)] for letter in "io")
    if math.prod(right.dims) != contracted * columns or math.prod(i.shape[0].dims) % columns:
        return None
    return math.prod(i.shape[0].dims) // columns, contracted, columns


def padded(rows: int, contracted: int, columns: int, unit: int) -> float:
    """The least time of a matrix product on units that hold unit x unit of one operand, over that without padding.

    The contracted dimension is padded, and the one of the operand that the unit holds; the other streams through. A
    product with a vector needs no matrix unit.
    """
    if min(rows, contracted, columns) <= 1:
        return 1.0
    up = lambda size: -(-size // unit) * unit / size  # noqa: E731
    return up(contracted) * min(up(rows), up(columns))


def _window(i: Instruction, dimensions: int) -> list[tuple[int, int, int, int, int]]:
    """Returns (size, stride, padding before, dilation of input, dilation of kernel) of each spatial dimension."""
    text = i.attribute("window") or "{}"
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))
    split = lambda key, default: fields[key].split("x") if key in fields else [default] * dimensions  # noqa: E731
    defaults = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    columns = [[int(n.partition("_")[0]) for n in split(key, default)] for key, default in defaults.items()]
    return list(zip(*columns, strict=True))


@functools.lru_cache(maxsize=4096)
def _valid(size_in: int, size_out: int, size: int, stride: int, pad: int, dilate_in: int, dilate_kernel: int) -> int:
    """Counts the (kernel, output) positions of one dimension that meet an element of the input."""
    total, outputs = 0, np.arange(size_out) * stride - pad
    for k in range(size):
        at = outputs + k * dilate_kernel
        total += int(np.sum((at >= 0) & (at <= (size_in - 1) * dilate_in) & (at % dilate_in == 0)))
    return total


def attention_flops(i: Instruction, operands: Sequence[Instruction]) -> tuple[float, int]:
    """FLOPs of a splash attention kernel with a causal mask, by the blocks that it visits, and its head size; 0 and 1
    for any other call.

    Two matrix products a block forward, three for the gradient of q alone, four for those of k and v, five for all.
    """
    match = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)
    metadata = re.search(r'"xprof_metadata":"(\{.*?\})"', i.attributes)
    if match is None or metadata is None:
        return 0.0, 1
    blocks, phase = json.loads(metadata[1].replace('\\"', '"')), match[1]
    single = [operand.shape[0] for operand in operands if len(operand.shape) == 1]
    arrays = [a for a in single if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")]
    queries, keys = arrays[0].dims, arrays[1].dims  # [..., heads, S, head_dim] and [..., kv heads, T, head_dim]
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[phase]
    block_q, block_kv = blocks[f"block_q{suffix}"], blocks[f"block_kv{suffix}"]
    visited = sum(
        min(math.ceil((row + 1) * block_q / block_kv), keys[-2] // block_kv) for row in range(queries[-2] // block_q)
    )
    fused = phase == "dkv" and any(len(a.dims) == len(queries) + 1 for a in i.shape)
    products = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[phase]
    return products * 2.0 * visited * block_q * block_kv * queries[-1] * math.prod(queries[:-2]), queries[-1]

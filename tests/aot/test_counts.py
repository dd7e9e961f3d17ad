"""Counts of small programs against the formulas of what they do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tele_jax.aot import counts, flops, hlo


def counted(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return counts.count(hlo.parse(jax.jit(function).lower(*shapes).compile().as_text()))


def test_loops_multiply_flops_and_collectives():
    layers, rows, width = 7, 16, 32
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def local(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jax.lax.all_gather(jnp.tanh(x @ w), "tensor", axis=1, tiled=True)

    def step(x, w):
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P("fsdp"), P("fsdp", "tensor")), out_specs=P("fsdp"), check_vma=False
        )
        return mapped(x, w), None

    found = counted(lambda x, w: jax.lax.scan(step, x, w)[0], (rows, width), (layers, width, width))
    assert found.matmul_flops == layers * 2 * (rows // 4) * width * (width // 2)
    gathers = {len(c.group): c for c in found.collectives if c.kind == "all-gather" and c.times == layers}
    assert gathers[4].result_bytes == 4 * width * width // 2 and gathers[4].operand_bytes == gathers[4].result_bytes / 4
    assert gathers[2].result_bytes == 4 * (rows // 4) * width
    assert gathers[4].group == (0, 2, 4, 6) and gathers[2].group == (0, 1)


def test_a_loop_in_a_loop():
    def square(x, _):
        return jnp.sin(x) @ x, None

    def outer(x, _):
        return jax.lax.scan(square, x, None, length=3)[0], None

    found = counted(lambda x: jax.lax.scan(outer, x, None, length=5)[0], (8, 8))
    assert found.matmul_flops == 15 * 2 * 8**3
    assert sorted(trips for _, trips in found.loops) == [3, 5]


def test_what_the_backward_pass_reads_is_saved_once_a_layer():
    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, w)[0].sum()

    found = counted(lambda w, x: jax.grad(loss)(w, x), (6, 16, 16), (4, 16))
    assert found.saved_bytes == 6 * 4 * 16 * 4


# ------------------------------------------------------------------------------------ programs as the TPU writes them


def program(body, more=""):
    return counts.count(hlo.parse(f"HloModule m\n{more}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"))


def test_a_batched_product_written_as_a_convolution():
    # BSD,DNH->BSNH, the heads as a spatial dimension of which padding leaves one product each.
    found = program(
        "  %x = bf16[2,1024,512,1]{3,2,1,0} parameter(0)\n"
        "  %w = bf16[512,2,128,1]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[2,1024,2,128]{1,3,2,0} convolution(%x, %w), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, "
        "dim_labels=0bf1_i1o0->0b1f"
    )
    # The input's own batch dimension lies in spatial dimension 0.
    assert found.matmul_flops == 2 * 2 * 1024 * 512 * 2 * 128


WINDOWS = list(itertools.product((1, 2), (0, 2), (1, 3), (1, 2)))


@pytest.mark.parametrize(("stride", "pad", "dilate", "kernel_dilate"), WINDOWS)
def test_convolutions_count_the_products_that_exist(stride, pad, dilate, kernel_dilate):
    shape, kernel = (2, 3, 9, 7), (4, 3, 3, 2)  # NCHW, OIHW
    dimensions = jax.lax.conv_dimension_numbers(shape, kernel, ("NCHW", "OIHW", "NCHW"))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), ((pad, pad),) * 2, (dilate, dilate), (kernel_dilate,) * 2, dimensions
        )

    ones = [np.ones(s, np.float32) for s in (shape, kernel)]
    lowered = jax.jit(convolve).lower(*ones)
    out = lowered.out_info.shape
    text = lowered.compiler_ir("hlo").as_hlo_text()  # before the compiler rewrites it as something else
    line = next(line for line in text.splitlines() if " convolution(" in line)
    instruction = hlo._instruction(line.strip())
    left, right = (hlo.Array("f32", s) for s in (shape, kernel))
    # With inputs of ones, every output is the number of products that were summed for it.
    expected = 2 * float(np.asarray(convolve(*ones)).sum())
    assert out == instruction.shape[0].dims
    assert flops.convolution_flops(instruction, left, right) == expected


def test_a_collective_written_in_several_fusions_counts_once():
    gather = "all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}"
    fused = (
        f"%start (p: f32[8]) -> f32[32] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %g = f32[32]{{0}} {gather}\n}}\n"
        f"%on (p: f32[8]) -> f32[32] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %h = f32[32]{{0:S(1)}} {gather}\n}}\n"
    )
    found = program(
        "  %a = f32[8]{0} parameter(0)\n"
        "  %one = f32[32]{0} fusion(%a), kind=kCustom, calls=%start\n"
        "  ROOT %two = f32[32]{0} fusion(%a), kind=kOutput, calls=%on",
        fused,
    )
    assert [(c.kind, c.times, c.result_bytes) for c in found.collectives] == [("all-gather", 1.0, 128)]


def test_a_reduction_of_which_only_a_part_is_kept_is_a_reduce_scatter():
    fused = (
        "%all-reduce-scatter.1 (p: f32[32]) -> f32[8] {\n"
        "  %p = f32[32]{0} parameter(0)\n"
        "  %r = f32[32]{0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add\n"
        "  %i = s32[] constant(0)\n"
        "  ROOT %s = f32[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}\n}\n"
    )
    found = program(
        "  %a = f32[32]{0} parameter(0)\n  ROOT %f = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
        fused,
    )
    assert [(c.kind, c.operand_bytes, c.result_bytes) for c in found.collectives] == [("reduce-scatter", 128, 32)]


def test_memory_counts_what_lies_in_hbm_and_of_slices_the_slices():
    fused = (
        "%take (p: f32[10,8], i: s32[]) -> f32[8] {\n"
        "  %p = f32[10,8]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}\n"
        "  ROOT %b = f32[8]{0} bitcast(%s)\n}\n"
        "%put (p: f32[10,8], v: f32[1,8], i: s32[]) -> f32[10,8] {\n"
        "  %p = f32[10,8]{1,0} parameter(0)\n  %v = f32[1,8]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  %z = s32[] constant(0)\n  ROOT %u = f32[10,8]{1,0} dynamic-update-slice(%p, %v, %i, %z)\n}\n"
    )
    found = program(
        "  %a = f32[10,8]{1,0} parameter(0)\n  %i = s32[]{:S(6)} parameter(1)\n"
        "  %row = f32[8]{0:S(1)} fusion(%a, %i), kind=kLoop, calls=%take\n"  # reads 32 bytes, writes none
        "  %one = f32[1,8]{1,0} negate(%row)\n"  # writes 32
        "  ROOT %all = f32[10,8]{1,0} fusion(%a, %one, %i), kind=kLoop, calls=%put",  # reads 32, writes 32
        fused,
    )
    assert found.hbm_bytes == 4 * 32


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4), ("fused", 5)])
def test_attention_kernels_count_the_blocks_they_visit(phase, products):
    batch, heads, length, width, block_q, block_kv = 3, 4, 1024, 64, 128, 256
    rows, columns = np.arange(length)[:, None], np.arange(length)[None, :]
    blocks = (columns <= rows).reshape(length // block_q, block_q, length // block_kv, block_kv).any(axis=(1, 3)).sum()
    suffix = {"fwd": "", "fused": "_dkv"}.get(phase, f"_{phase}")
    name = "dkv" if phase == "fused" else phase
    metadata = f'{{\\"block_q{suffix}\\": {block_q}, \\"block_kv{suffix}\\": {block_kv}}}'
    operand = f"bf16[{batch},{heads},{length},{width}]{{3,2,1,0}}"
    result = f"(bf16[4,{batch},{heads},{length},{width}]{{4,3,2,1,0}}, {operand})" if phase == "fused" else operand
    found = program(
        f"  %q = {operand} parameter(0)\n  %m = s8[1,8,4]{{2,1,0}} parameter(1)\n"
        f"  ROOT %splash_mha_{name}_segmented.1 = {result} custom-call(%m, %q, %q, %q), "
        f'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{\n'
        f'"xprof_metadata":"{metadata}"\n}}}}'
    )
    assert found.kernel_flops == products * 2 * blocks * block_q * block_kv * width * batch * heads


@pytest.mark.parametrize(
    ("rows", "contracted", "columns", "unit", "share"),
    [
        (4096, 4096, 4096, 256, 1),
        (4096, 128, 4096, 256, 2),  # q k^T with heads of 128: half of each unit is idle
        (4096, 4096, 128, 256, 1),  # its columns stream through a unit that holds the rows
        (128, 4096, 128, 256, 2),
        (4096, 160, 4096, 128, 256 / 160),
        (8, 4096, 12288, 128, 1),  # decoding: eight rows stream
        (1, 4096, 128, 256, 1),  # a product with a vector
        (10_912, 8192, 5460, 256, min(11_008 / 10_912, 5632 / 5460)),
    ],
)
def test_a_product_pays_for_the_part_of_a_matrix_unit_that_it_leaves_idle(rows, contracted, columns, unit, share):
    text = (
        f"HloModule m\nENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = bf16[3,{rows},{contracted}]{{2,1,0}} parameter(0)\n"
        f"  %b = bf16[3,{contracted},{columns}]{{2,1,0}} parameter(1)\n  ROOT %d = bf16[3,{rows},{columns}]{{2,1,0}} "
        "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}\n}\n"
    )
    found = counts.count(hlo.parse(text), unit)
    assert found.matmul_flops == 3 * 2 * rows * contracted * columns
    assert found.padding_flops == pytest.approx((share - 1) * found.matmul_flops)
    assert found.work[0][0] == pytest.approx(share * found.matmul_flops)
    assert counts.count(hlo.parse(text)).padding_flops == 0


def test_a_product_as_a_convolution_pays_for_its_padding_where_its_sizes_are_clear():
    plain = (
        "  %x = bf16[512,96]{1,0} parameter(0)\n  %w = bf16[96,1024]{1,0} parameter(1)\n"
        "  ROOT %c = bf16[512,1024]{1,0} convolution(%x, %w), dim_labels=bf_io->bf"
    )
    text = f"HloModule m\nENTRY %main (a: f32[8]) -> f32[8] {{\n{plain}\n}}\n"
    assert counts.count(hlo.parse(text), 128).padding_flops == pytest.approx((128 / 96 - 1) * 2 * 512 * 96 * 1024)


@pytest.mark.parametrize(
    ("kind", "operand", "result", "members", "receives"),
    [
        ("all-gather", 100, 800, 8, 700),  # the parts of the others
        ("reduce-scatter", 800, 100, 8, 700),
        ("all-reduce", 800, 800, 8, 1400),  # a reduce-scatter and an all-gather
        ("all-to-all", 800, 800, 8, 700),
        ("collective-permute", 800, 800, 2, 800),
        ("all-reduce", 800, 800, 1, 0),
    ],
)
def test_a_device_receives_what_the_others_have(kind, operand, result, members, receives):
    one = counts.Collective(kind, 3.0, operand, result, tuple(range(members)), "", None)
    assert one.received_bytes == receives
    both = counts.Counts(0, 0, 0, 0, 0, (one, one), ())
    assert both.received_bytes == 2 * 3 * receives and both.collective_bytes == 2 * 3 * result


def test_a_ring_sends_as_many_bytes_as_are_counted():
    """The algorithm itself, on numbers: what each device gets from its neighbour until every sum is complete."""
    n, part = 5, 3
    held = np.random.default_rng(0).integers(0, 9, (n, n, part))
    sums, got = held.copy(), np.zeros(n)
    for turn in range(2 * (n - 1)):  # reduce-scatter, then all-gather
        sent = [(d, (d - turn) % n, sums[d, (d - turn) % n].copy()) for d in range(n)]
        for device, piece, values in sent:
            to = (device + 1) % n
            sums[to, piece] = sums[to, piece] + values if turn < n - 1 else values
            got[to] += values.size
    assert (sums == held.sum(axis=0)).all()
    one = counts.Collective("all-reduce", 1.0, n * part, n * part, tuple(range(n)), "", None)
    assert (got == one.received_bytes).all()


# ------------------------------------------------------------------------------------------------------- the schedule

SCHEDULED = """
  %a = f32[8]{0} parameter(0)
  %x = f32[64,64]{1,0} broadcast(%a), dimensions={}
  %g = f32[128,64]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  %s = (f32[64,64]{1,0}, f32[128,64]{1,0}) all-gather-start(%x), channel_id=2, replica_groups=[1,2]<=[2], dimensions={0}
  %d = f32[128,64]{1,0} dot(%g, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %e = f32[128,64]{1,0} all-gather-done(%s)
  %b = f32[128,64]{1,0} fusion(%d, %x), kind=kOutput, calls=%both
  %w = f32[128,64]{1,0} fusion(%x), kind=kCustom, calls=%waits
  ROOT %r = f32[8]{0} slice(%w), slice={[0:8]}
"""
FUSED = """
%both (p: f32[128,64], q: f32[64,64]) -> f32[128,64] {
  %p = f32[128,64]{1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  %h = f32[128,64]{1,0} all-gather(%q), channel_id=3, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %m = f32[128,64]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%waits (q: f32[64,64]) -> f32[128,64] {
  %q = f32[64,64]{1,0} parameter(0)
  ROOT %k = f32[128,64]{1,0} all-gather(%q), channel_id=4, replica_groups=[1,2]<=[2], dimensions={0}
}
"""


def test_the_device_waits_for_collectives_that_nothing_overlaps():
    found = program(SCHEDULED, FUSED)
    # Started and waited for later: 2; merged with a product: 3. Plain, or alone in a fusion: 1 and 4.
    assert {c.channel: c.overlapped for c in found.collectives} == {"1": False, "2": True, "3": True, "4": False}
    # The work is that of the two products; what a collective reads and writes belongs to its own time.
    products = [flops for flops, _, times in found.work for _ in range(int(times)) if flops]
    assert products == [2 * 128 * 64 * 64] * 2
    assert sum(flops * times for flops, _, times in found.work) == found.matmul_flops
    waited = 2 * (64 * 64 + 128 * 64) * 4
    assert sum(size * times for _, size, times in found.work) < found.hbm_bytes - waited

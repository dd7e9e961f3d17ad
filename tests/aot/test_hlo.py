"""The text of compiled programs, as the CPU's compiler writes it and in the spellings of the TPU's."""

import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tele_jax.aot import counts, hlo


def text_of(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def loops(text):
    module = hlo.parse(text)
    return sorted(
        hlo.trip_count(module, i, computation)
        for computation in module.computations.values()
        for i in computation.instructions.values()
        if i.opcode == "while"
    )


def test_trip_counts_of_nested_and_offset_loops():
    def nested(x):
        inner = lambda x, _: (jnp.sin(x) @ x, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)  # noqa: E731
        x = jax.lax.scan(outer, x, None, length=5)[0]
        return jax.lax.fori_loop(2, 9, lambda i, x: jnp.cos(x) @ x, x)

    assert loops(text_of(nested, (8, 8))) == [3, 5, 7]


@pytest.mark.parametrize(
    ("start", "goes_on", "stride"),
    [
        (0, lambda i: i < 10, 2),
        (1, lambda i: i < 10, 2),
        (0, lambda i: i < 10, 3),
        (3, lambda i: i <= 12, 3),
        (3, lambda i: operator.ge(12, i), 4),
        (9, lambda i: i > 0, -2),
        (9, lambda i: i >= 0, -3),
        (0, lambda i: i != 12, 4),
        (-4, lambda i: i + 3 < 8, 5),
    ],
)
def test_a_loop_runs_as_often_as_its_counter_needs(start, goes_on, stride):
    def steps(x):
        return jax.lax.while_loop(lambda s: goes_on(s[0]), lambda s: (s[0] + stride, jnp.sin(s[1]) @ s[1]), (start, x))

    runs, counter = 0, start
    while goes_on(counter):
        runs, counter = runs + 1, counter + stride
    # Compilers for TPUs do not write the length of a loop beside it, as that for CPUs does.
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text_of(steps, (8, 8)))
    assert "known_trip_count" not in text
    assert loops(text) == [runs]


# How a TPU's compiler writes a product whose operand is gathered meanwhile: two parts an iteration, and the counter,
# with its bound, inside fusions.
WIDENED = """HloModule m
%advance (s: s32[]) -> (s32[], s32[]) {
  %s = s32[] parameter(0)
  %two = s32[] constant(2)
  %one = s32[] constant(1)
  %next = s32[] add(%s, %two)
  %odd = s32[] add(%s, %one)
  ROOT %both = (s32[], s32[]) tuple(%odd, %next)
}
%below (s: s32[], n: s32[]) -> pred[] {
  %s = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %less = pred[] compare(%s, %n), direction=LT
}
%body (t: (f32[4,4], s32[], s32[])) -> (f32[4,4], s32[], s32[]) {
  %t = (f32[4,4], s32[], s32[]) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%t), index=0
  %i = s32[] get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  %first = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %second = f32[4,4]{1,0} dot(%first, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %moved = (s32[], s32[]) fusion(%i), kind=kLoop, calls=%advance
  %next = s32[] get-tuple-element(%moved), index=1
  ROOT %out = (f32[4,4], s32[], s32[]) tuple(%second, %next, %n)
}
%condition (t: (f32[4,4], s32[], s32[])) -> pred[] {
  %t = (f32[4,4], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %c = pred[] fusion(%i, %n), kind=kLoop, calls=%below
}
ENTRY %main (a: f32[4,4]) -> (f32[4,4], s32[], s32[]) {
  %a = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %eight = s32[] constant(8)
  %state = (f32[4,4], s32[], s32[]) tuple(%a, %zero, %eight)
  ROOT %loop = (f32[4,4], s32[], s32[]) while(%state), condition=%condition, body=%body
}
"""


def test_a_loop_that_does_two_parts_at_a_time_is_counted_once():
    assert loops(WIDENED) == [4]
    assert counts.count(hlo.parse(WIDENED)).matmul_flops == 8 * 2 * 4**3


@pytest.mark.parametrize(
    ("what", "written", "instead"),
    [
        ("a bound that the loop changes", "tuple(%second, %next, %n)", "tuple(%second, %next, %i)"),
        ("a counter that stands still", "%next = s32[] add(%s, %two)", "%next = s32[] add(%s, %zero)"),
        ("a counter that is doubled", "%next = s32[] add(%s, %two)", "%next = s32[] add(%s, %s)"),
        ("a counter that runs away", "direction=LT", "direction=GT"),
        ("a bound that comes from elsewhere", "%eight = s32[] constant(8)", "%eight = s32[] custom-call()"),
    ],
)
def test_a_loop_whose_length_cannot_be_read_is_refused(what, written, instead):
    text = WIDENED.replace("%one = s32[] constant(1)", "%one = s32[] constant(1)\n  %zero = s32[] constant(0)")
    assert written in text
    with pytest.raises(ValueError, match=r"the length of the loop loop is not in the compiled program"):
        loops(text.replace(written, instead))


def test_a_loop_whose_length_depends_on_data_is_refused():
    text = text_of(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: jnp.exp(x) @ x, x), (8, 8))
    with pytest.raises(ValueError, match=r"the length of the loop while.* is not in the compiled program"):
        loops(text)


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="install the libtpu that this jax names"):
        hlo.parse("HloModule <binary>")


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}", [[1, 2], [2, 1]]),
    ],
)
def test_groups_of_devices_in_every_spelling(written, groups):
    line = f"%x = f32[4]{{0}} all-reduce(%y), channel_id=1, {written}, use_global_device_ids=true"
    np.testing.assert_array_equal(hlo.device_groups(hlo._instruction(line)), groups)


def test_shapes_carry_bytes_and_memory_space():
    found = hlo.arrays("(bf16[2,1024]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, pred[3]{0:T(512)S(5)}, s4[6]{0})")
    assert [(a.dtype, a.dims, a.space, a.bytes) for a in found] == [
        ("bf16", (2, 1024), 1, 4096),
        ("f32", (), hlo.HBM, 4),
        ("pred", (3,), hlo.HOST, 3),
        ("s4", (6,), hlo.HBM, 3),
    ]


def test_computations_of_another_core_end_where_they_end():
    text = """HloModule m
%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}, execution_thread="sparsecore"

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} call(%a), to_apply=%inner
}
"""
    module = hlo.parse(text)
    assert {name: list(c.instructions) for name, c in module.computations.items()} == {
        "inner": ["p", "n"],
        "main": ["a", "c"],
    }

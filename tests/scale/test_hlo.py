"""The text of compiled programs, as the CPU's compiler writes it and in the spellings of the TPU's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tele_jax.scale import hlo


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

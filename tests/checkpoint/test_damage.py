"""Every kind of damage to every kind of file is found, and its leaf and file are named in one line."""

import json
import shutil

import optax
import pytest

from tele_jax import checkpoint
from tele_jax.errors import DamageError, UserError
from tests.checkpoint.trees import CFG, chunk_files, params


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "0"
    state = optax.adam(1e-3).init(params())
    checkpoint.save(path, CFG, params(), opt_state=state, provenance=[{"stage": "pretrain"}], data_state=b"position")
    return path


@pytest.fixture
def step(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "0")
    return tmp_path / "0"


def flip(file, position=None):
    """One bit of one byte, by default in the middle."""
    content = bytearray(file.read_bytes())
    position = len(content) // 2 if position is None else position
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def empty(file):
    file.write_bytes(b"")


def zeros(file):
    """What a disk that lost a block shows."""
    file.write_bytes(bytes(file.stat().st_size))


LEAVES = [
    "params/embed.table",
    "params/layers.attn.q",
    "params/layers.mlp_norm.scale",
    "opt_state/0.nu.layers.mlp.down",
    "opt_state/0.count",
    "data/state",
]
HARM = {"flip": flip, "truncate": truncate, "empty": empty, "zeros": zeros, "delete": lambda file: file.unlink()}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_damaged_chunk_is_named(step, leaf, harm):
    file = chunk_files(step, leaf)[-1]
    HARM[harm](file)
    with pytest.raises(DamageError) as caught:
        checkpoint.load(step)
    assert str(caught.value).startswith(f"{leaf}: damaged: ")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value) and "tensorstore" not in str(caught.value)

    (found,) = checkpoint.verify(checkpoint.open_lazy(step))
    assert (found.leaf, found.file) == (leaf, file)
    assert found.problem


@pytest.mark.parametrize("position", [0, 17, -1, -4])
def test_any_byte_of_a_chunk_counts(step, position):
    (file,) = chunk_files(step, "params/layers.attn.v")
    array = checkpoint.open_lazy(step).params["layers"]["attn"]["v"]
    size = array.leaf.chunk_bytes
    flip(file, size + position % size)  # of the second layer
    array[0]
    with pytest.raises(DamageError, match=r"params/layers.attn.v: damaged: .*/c/0/0/0/0.*[dD]igest"):
        array[1]
    (found,) = checkpoint.verify(checkpoint.open_lazy(step))
    assert found.problem == "the checksum of chunk [1, 0, 0, 0] is not that of its content"


@pytest.mark.parametrize("position", [-1, -4, -5, -52])
def test_any_byte_of_an_index_counts(step, position):
    (file,) = chunk_files(step, "params/layers.attn.v")
    flip(file, position % file.stat().st_size)
    with pytest.raises(DamageError, match=r"params/layers.attn.v: damaged: .*/c/0/0/0/0.*[dD]igest"):
        checkpoint.open_lazy(step).params["layers"]["attn"]["v"][1]
    (found,) = checkpoint.verify(checkpoint.open_lazy(step))
    assert "no index with its checksum" in found.problem


def test_what_is_not_read_is_not_in_the_way(step):
    flip(chunk_files(step, "opt_state/0.mu.embed.table")[0])
    checkpoint.load(step, items=("params",))


def test_verify_finds_all_of_it(step):
    files = [chunk_files(step, leaf)[0] for leaf in LEAVES]
    for file in files:
        truncate(file)
    assert {damage.file for damage in checkpoint.verify(checkpoint.open_lazy(step))} == set(files)


def test_a_chunk_that_is_too_long_is_damage_too(step):
    for leaf, problem in [
        ("params/layers.attn.q", "3,137 bytes, and no index with its checksum at their end"),
        ("params/embed.table", "2,565 bytes, expected 2,564"),
    ]:
        (file,) = chunk_files(step, leaf)
        whole = file.read_bytes()
        file.write_bytes(whole + b"\0")
        (found,) = checkpoint.verify(checkpoint.open_lazy(step))
        assert found.problem == problem
        file.write_bytes(whole)


def edit_json(change):
    def harm(file):
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))

    return harm


ZARR_HARM = {
    "delete": (lambda file: file.unlink(), "zarr.json is missing"),
    "truncate": (truncate, "zarr.json: damaged, not JSON"),
    "not text": (lambda file: file.write_bytes(b"\xff\xfe"), "zarr.json: damaged, not UTF-8"),
    "list": (lambda file: file.write_text("[]"), "zarr.json: damaged, not a table"),
    "shape": (edit_json(lambda d: d.update(shape=[3, 16, 8, 4])), r"zarr.json: shape is \[3, 16, 8, 4\], written as"),
    "dtype": (
        edit_json(lambda d: d.update(data_type="int32")),
        'zarr.json: data_type is "int32", written as "float32"',
    ),
    "codecs": (edit_json(lambda d: d["codecs"].pop()), "zarr.json: codecs is"),
}


@pytest.mark.parametrize("harm", ZARR_HARM)
def test_damaged_array_metadata_is_named(step, harm):
    change, message = ZARR_HARM[harm]
    change(step / "params" / "layers.attn.q" / "zarr.json")
    for read in (checkpoint.open_lazy, checkpoint.load):
        with pytest.raises(DamageError, match=f"{step}: damaged: params/layers.attn.q: {message}"):
            read(step)


def test_every_damaged_array_is_named(step):
    for leaf in LEAVES:
        shutil.rmtree(step / leaf)
    with pytest.raises(DamageError) as caught:
        checkpoint.open_lazy(step)
    for leaf in LEAVES:
        assert f"{leaf}: zarr.json is missing" in str(caught.value)


META_HARM = {
    "flip": (flip, "damaged"),
    "truncate": (truncate, "damaged, not JSON"),
    "empty": (empty, "damaged, not JSON"),
    "zeros": (zeros, "damaged, not JSON"),
    "not text": (lambda file: file.write_bytes(b"\xff\xfe{}"), "damaged, not UTF-8 at byte 0"),
    "not ours": (lambda file: file.write_text('{"a": 1}'), "does not have the checksum"),
    "a list": (lambda file: file.write_text("[1]"), "damaged, not a table, but list"),
    "another step": (edit_json(lambda d: d.update(step=1)), "does not have the checksum"),
    "another epsilon": (edit_json(lambda d: d["config"].update(rms_eps=1e-6)), "does not have the checksum"),
    "another chunk": (
        edit_json(lambda d: d["items"]["data"]["state"].update(chunks=[9])),
        "does not have the checksum",
    ),
    "delete": (lambda file: file.unlink(), "missing; damaged, or not a checkpoint of tele_jax"),
}


@pytest.mark.parametrize("harm", META_HARM)
def test_a_damaged_meta_document_is_named(step, harm):
    change, message = META_HARM[harm]
    change(step / "meta" / "meta.json")
    with pytest.raises(DamageError, match=f"{step}/meta/meta.json: .*{message}"):
        checkpoint.open_lazy(step)


def test_any_byte_of_the_meta_document_counts(step):
    """A flip is either no JSON any more, or another checksum; of white space, nothing that matters."""
    file = step / "meta" / "meta.json"
    original = file.read_bytes()
    for position in range(0, len(original), 97):
        flip(file, position)
        if json_or_none(file.read_bytes()) != json.loads(original):
            with pytest.raises(DamageError, match="damaged"):
                checkpoint.open_lazy(step)
        file.write_bytes(original)


def json_or_none(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize("item", ["params", "opt_state", "data"])
def test_a_missing_item_is_named(step, item):
    shutil.rmtree(step / item)
    with pytest.raises(DamageError, match=f"{step}: damaged: {item}: the item is missing"):
        checkpoint.load(step)


def test_another_format_is_the_users_business(step):
    from tele_jax.checkpoint import layout

    file = step / "meta" / "meta.json"
    document = json.loads(file.read_text())
    document.pop("sha256")
    document["format"] = 3
    file.write_text(json.dumps({"sha256": layout._digest(document), **document}))
    with pytest.raises(UserError, match=r"meta.json: format 3, but this version of tele_jax reads formats 1 and 2"):
        checkpoint.load(step)

"""Merging from checkpoint to checkpoint: the bits of surgery.merge, a receipt, and nothing overwritten."""

import json

import ml_dtypes
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, surgery
from tele_jax.cli.main import main
from tele_jax.growth.merge_stored import merge_stored
from tele_jax.growth.merging import Recipe
from tests.growth.test_merging import CFG, random_tree

DEEP = CFG.replace(num_layers=5)
WAYS = [
    dict(weights=(1.0, 2.0)),
    dict(method="slerp", t=0.3),
    dict(method="slerp", t=0.3, scope="model"),
    dict(method="task_arithmetic", scale=0.4),
    dict(method="ties", density=0.3),
    dict(method="ties", density=0.3, scope="model"),
    dict(method="passthrough", slices=((1, 1, 3), (0, 0, 2))),
]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """{(dtype, number): path}, and in memory; number 2 is the base, "deep" has more layers."""
    root, made = tmp_path_factory.mktemp("merge"), {}
    for dtype in DTYPES:
        for number in (0, 1, 2):
            cfg = CFG.replace(param_dtype=dtype)
            made[dtype, number] = root / f"{dtype}{number}"
            history = [{"stage": f"trained {number}"}]
            tree = random_tree(number, DTYPES[dtype])
            checkpoint.save(made[dtype, number], cfg, tree, step=7, provenance=history)
    made["deep"] = root / "deep"
    checkpoint.save(made["deep"], DEEP, random_tree(4, cfg=DEEP))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_streamed_is_in_memory_bit_for_bit(way, dtype, stored, tmp_path):
    base = stored[dtype, 2] if way.get("method") in ("task_arithmetic", "ties") else None
    trees = [random_tree(number, DTYPES[dtype]) for number in (0, 1, 2)]
    expected = surgery.merge(CFG, trees[:2], **way, **({} if base is None else {"base": trees[2]}))
    for chunk_bytes, workers in ((300, 3), (2**20, 1)):
        dst = tmp_path / str(chunk_bytes)
        how = {"chunk_bytes": chunk_bytes, "workers": workers, "base": base}
        merge_stored(Recipe(**way), [stored[dtype, 0], stored[dtype, 1]], dst, **how)
        lazy = checkpoint.open_lazy(dst)
        found = surgery.diff(lazy.params, expected)
        assert found.equal, found
        assert lazy.step == 7 and lazy.opt_state is None
    assert not list(checkpoint.verify(lazy))


def test_finely_cut_sources_of_several_depths(stored, tmp_path):
    fine = tmp_path / "fine"
    merge_stored(Recipe(method="passthrough", slices=((0, 0, 5),)), [stored["deep"]], fine, chunk_bytes=200)
    recipe = Recipe(method="passthrough", slices=((0, 1, 3), (1, 2, 5)))
    merge_stored(recipe, [stored["float32", 0], fine], tmp_path / "dst")
    loaded = checkpoint.load(tmp_path / "dst")
    trees = [random_tree(0), random_tree(4, cfg=DEEP)]
    assert surgery.diff(loaded.params, surgery.merge([CFG, DEEP], trees, "passthrough", slices=recipe.slices)).equal
    assert loaded.cfg == CFG.replace(num_layers=5)
    tele.forward(loaded.cfg, loaded.params, np.zeros((1, 4), np.int32))


def test_a_merge_that_was_stopped_goes_on(stored, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total):
        if done > total / 2:
            raise Stopped

    srcs, how = [stored["float32", 0], stored["float32", 1]], {"chunk_bytes": 400, "workers": 1}
    with pytest.raises(Stopped):
        merge_stored(Recipe(), srcs, tmp_path / "dst", progress=stop, **how)
    assert not (tmp_path / "dst").exists()
    with pytest.raises(tele.UserError, match="begun with another merge"):
        merge_stored(Recipe(weights=(1, 3)), srcs, tmp_path / "dst", **how)
    figures, _ = merge_stored(Recipe(), srcs, tmp_path / "dst", **how)
    assert 0 < figures.resumed_tiles < figures.tiles
    expected = surgery.merge(CFG, [random_tree(0), random_tree(1)])
    assert surgery.diff(checkpoint.open_lazy(tmp_path / "dst").params, expected).equal


def test_the_command_writes_a_receipt_that_inspect_reads(stored, tmp_path, capsys):
    srcs, dst = [str(stored["float32", number]) for number in (0, 1)], tmp_path / "dst"
    command = ["merge", *srcs, str(dst), "--method", "ties", "--base", str(stored["float32", 2]), "--density", "0.5"]
    assert main([*command, "--json", str(tmp_path / "figures.json")]) == 0
    receipt = json.loads((dst / "merge_receipt.json").read_text())
    assert receipt["method"] == "ties" and receipt["density"] == 0.5
    paths = [source["path"] for source in (*receipt["sources"], receipt["base"])]
    assert paths == [*srcs, str(stored["float32", 2])]
    for source in (*receipt["sources"], receipt["base"]):
        assert source["params"] == checkpoint.fingerprint(checkpoint.open_lazy(source["path"]))
    assert receipt["destination"]["params"] == checkpoint.fingerprint(checkpoint.open_lazy(dst))
    assert receipt["histories"][1] == [{"stage": "trained 1"}]
    capsys.readouterr()
    assert main(["inspect", str(dst), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "trained 0" in printed and '"kind": "merge"' in printed and srcs[1] in printed
    before = (dst / "merge_receipt.json").stat().st_mtime_ns
    assert main(command) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert (dst / "merge_receipt.json").stat().st_mtime_ns == before


REFUSED = {
    "models have [3, 5] layers": ["deep"],
    "param_dtype='bfloat16', not 'float32'": [("bfloat16", 0)],
    "ties needs a base": [("float32", 1), "--method", "ties"],
    "--weights a: expected numbers": [("float32", 1), "--weights", "a"],
    "--slices 1: expected I:A-B": [("float32", 1), "--method", "passthrough", "--slices", "1"],
    "no model 2": [("float32", 1), "--method", "passthrough", "--slices", "2:0-1"],
    "is too little for": [("float32", 1), "--memory-gb", "0.01"],
    "two models or more": [],
    "no such directory": ["/nowhere"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_merged_is_one_line(message, stored, tmp_path, capsys):
    words = [str(stored.get(word, word)) for word in REFUSED[message]]
    others = [word for word in words if not word.startswith("-")][:1]
    flags = words[len(others) :]
    assert main(["merge", str(stored["float32", 0]), *others, str(tmp_path / "dst"), *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_source_is_named(stored, tmp_path):
    source = tmp_path / "damaged"
    checkpoint.save(source, CFG, random_tree(0))
    file = next((source / "params" / "layers.mlp.up").rglob("0/0/0"))
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(tele.DamageError, match=r"layers\.mlp\.up"):
        merge_stored(Recipe(), [source, stored["float32", 1]], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_the_tokenizer_is_that_of_the_embedding_and_all_have_one(tmp_path, capsys):
    for number, text in enumerate(("a", "b")):
        checkpoint.save(tmp_path / str(number), CFG, random_tree(number))
        (tmp_path / str(number) / "tokenizer.json").write_text(text)
    srcs = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert main(["merge", *srcs, str(tmp_path / "dst")]) == 2
    assert "is another tokenizer than" in capsys.readouterr().err and not (tmp_path / "dst").exists()
    (tmp_path / "0" / "tokenizer.json").unlink()
    assert main(["merge", *srcs, str(tmp_path / "dst")]) == 0
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == "b"

"""A cache on disk: what is damaged, incomplete or of something else is never read as if it were whole."""

import json
import shutil

import numpy as np
import pytest

from tele_jax.data import cache
from tele_jax.errors import DamageError, UserError
from tests.data import caches


@pytest.fixture(scope="module")
def whole(model_file, texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    path = caches.write_lines(
        directory / "a.jsonl", [{"text": line} for line in "".join(texts[:6]).splitlines() if line]
    )
    made = caches.config(model_file, {"a": (path, "jsonl", 1), "b": (path, "jsonl", 2)}, shard_bytes=9000)
    caches.make(made, directory / "rows")
    return directory / "rows"


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "rows")
    return tmp_path / "rows"


def read_all(path):
    opened = cache.RowCache(path)
    for name in opened.rows:
        caches.whole_domain(opened, name)


def test_any_row_is_read_alone_as_with_others(whole):
    opened = cache.RowCache(whole)
    everything = caches.whole_domain(opened, "b")
    assert len(opened.manifest.domains["b"].shards) > 2
    places = np.random.default_rng(0).permutation(opened.rows["b"])[:40].tolist()
    together = opened.read(["b"] * len(places), places)
    assert caches.same(together, {name: column[places] for name, column in everything.items()})
    mixed = opened.read(["a", "b", "a"], [3, 0, 1])
    for i, (name, row) in enumerate((("a", 3), ("b", 0), ("a", 1))):
        alone = opened.read([name], [row])
        assert all((mixed[column][i] == alone[column][0]).all() for column in mixed)


def test_many_shards_are_read_through_few_open_files(whole, monkeypatch):
    monkeypatch.setattr(cache, "OPEN_SHARDS", 1)
    few = cache.RowCache(whole)
    batch = caches.whole_domain(few, "a")
    monkeypatch.undo()
    assert caches.same(batch, caches.whole_domain(cache.RowCache(whole), "a"))
    few.close()
    assert caches.same(few.read(["a"], [0]), {name: column[:1] for name, column in batch.items()})


@pytest.mark.parametrize("where", [0.3, 0.5, 0.9])
def test_a_changed_byte_of_a_row_is_found(copy, where):
    shard = sorted(copy.glob("a/*.array_record"))[1]
    data = bytearray(shard.read_bytes())
    written = max(i for i, byte in enumerate(data[:-65_536]) if byte)  # padding follows, and in the last 64 kB an index
    data[int(where * written)] ^= 0x20
    shard.write_bytes(data)
    with pytest.raises(DamageError, match=rf"{shard.name}: damaged"):
        read_all(copy)


def test_every_changed_byte_is_found_by_verify_and_none_gives_another_row(copy, whole):
    opened = cache.RowCache(copy)
    assert [problem for _, problem in opened.verify()] == [None] * len(list(copy.glob("*/*.array_record")))
    expected = {name: caches.whole_domain(opened, name) for name in opened.rows}
    shard = sorted(copy.glob("a/*.array_record"))[0]
    data = shard.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 60).tolist():
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        damaged = cache.RowCache(copy)
        assert [each.file for each, problem in damaged.verify() if problem] == ["a/" + shard.name]
        try:
            batch = caches.whole_domain(damaged, "a")
        except DamageError:
            continue
        assert caches.same(batch, expected["a"]), "in padding, where it does not matter"


def test_a_shard_that_is_cut_or_missing_is_found_before_anything_is_read(copy):
    shard = sorted(copy.glob("b/*.array_record"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DamageError, match=rf"{shard.name}: damaged, {len(data) - 1} bytes instead of {len(data)}"):
        cache.RowCache(copy)
    shard.unlink()
    with pytest.raises(DamageError, match=rf"{shard.name}: this shard of the cache is missing"):
        cache.RowCache(copy)


def test_a_shard_that_holds_other_rows_is_damage(copy):
    first, second = sorted(copy.glob("a/*.array_record"))[:2]
    second.write_bytes(first.read_bytes())
    opened = cache.RowCache(copy)
    assert [each.file for each, problem in opened.verify() if problem] == ["a/" + second.name]
    with pytest.raises(DamageError, match=rf"{second.name}: damaged \(\d+ rows instead of \d+\)"):
        caches.whole_domain(opened, "a")


def test_a_manifest_that_was_edited_or_cut_is_damage(copy):
    file = copy / "manifest.json"
    text = file.read_text()
    for changed in (text.replace('"seq_len": 64', '"seq_len": 32'), text[:-20], "[]", "{}", "\xff"):
        assert changed != text
        file.write_bytes(changed.encode("latin-1"))
        with pytest.raises(DamageError, match=r"manifest\.json: damaged"):
            cache.RowCache(copy)


def test_what_is_no_cache_is_said(copy, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"absent: not a row cache, it holds no manifest\.json; make it with: tele data"
    ):
        cache.RowCache(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"format": "tele_jax cleaned text 1", "shards": {}}')
    with pytest.raises(UserError, match=r"other: not a row cache, its manifest\.json is of something else"):
        cache.RowCache(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for here in (".", ".."):
        with pytest.raises(UserError, match=r"not a row cache, it holds no manifest\.json"):
            cache.RowCache(here)
    copy.rename(tmp_path / "half.incomplete")
    with pytest.raises(UserError, match="half: not a row cache, it is not complete yet"):
        cache.RowCache(tmp_path / "half")


def test_a_cache_of_the_future_is_not_guessed_at(copy):
    content = json.loads((copy / "manifest.json").read_text())
    del content["sha256"]
    content["format"] = 99
    (copy / "manifest.json").write_text(json.dumps({**content, "sha256": cache._digest(content)}))
    with pytest.raises(UserError, match="a cache of format 99, this version reads format 1"):
        cache.RowCache(copy)


def test_the_digest_names_the_content(whole, copy):
    manifests = [cache.read_manifest(path) for path in (whole, copy)]
    assert manifests[0] == manifests[1] and manifests[0].digest == manifests[1].digest

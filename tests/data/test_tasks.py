"""Domains of a page as seqio knows them: registered by name, drawn at their rates, the same for the same seed."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from tele_jax.errors import UserError
from tele_jax.settings import SourceConfig
from tests.data import caches

seqio = pytest.importorskip("seqio", reason="seqio is not installed: pip install 'tele_jax[data]'")


@pytest.fixture
def page(model_file, texts, tmp_path):
    lines = [line for text in texts for line in text.splitlines() if len(line) > 20]
    sources = {}
    for name, part, rate in (("WebText", lines[:300], 3), ("Profession-Law", lines[300:500], 1)):
        path = caches.write_lines(tmp_path / f"{name}.jsonl", [{"text": line} for line in part])
        sources[name] = (path, "jsonl", rate)
    made = caches.config(model_file, sources, seq_len=32)
    held_out = caches.write_lines(tmp_path / "validation.jsonl", [{"text": "held out, and nothing else"}] * 30)
    web = dataclasses.replace(made.data.sources["WebText"], validation_files=(held_out,))
    sources = {**made.data.sources, "WebText": web}
    return dataclasses.replace(made, data=dataclasses.replace(made.data, sources=sources))


@pytest.fixture
def name(request):
    """A name of its own for every test: seqio's registries are one for the process."""
    made = "page_" + re.sub(r"\W", "_", request.node.name)
    yield made
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for each in list(registry.names()):
            if each.startswith(made):
                registry.remove(each)


def rows(mixture, count, seed=0):
    dataset = seqio.get_mixture_or_task(mixture).get_dataset(
        sequence_length=None, split="train", seed=seed, shuffle=True, trim_output_features=False
    )
    return [{key: value.numpy() for key, value in row.items()} for row in dataset.take(count)]


def test_a_page_becomes_tasks_and_a_mixture(page, name, vocabulary):
    from tele_jax.data import tasks

    made = tasks.register(name, page)
    assert set(seqio.TaskRegistry.names()) >= {f"{name}.WebText", f"{name}.Profession_Law"}
    assert seqio.get_mixture_or_task(name) is made
    web, law = (seqio.TaskRegistry.get(f"{name}.{domain}") for domain in ("WebText", "Profession_Law"))
    assert made.get_rate(web) / made.get_rate(law) == 3
    assert set(web.splits) == {"train", "validation"} and set(law.splits) == {"train"}
    drawn = rows(name, 400)
    assert drawn[0]["tokens"].shape == (32,) and set(drawn[0]) >= {"targets", "loss_weights", "segment_ids"}
    ours = Path(page.data.sources["Profession-Law"].files[0]).read_text(encoding="utf-8")
    share = np.mean([in_text(row, ours, vocabulary) for row in drawn])
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 400))


def in_text(row, text, vocabulary):
    """Whether the longest segment of a row is in the text; JSON's escapes are left out of the comparison."""
    ids = row["segment_ids"]
    longest = np.bincount(ids).argmax()
    spelled = vocabulary.decode(row["targets"][ids == longest].tolist()).strip("\ufffd")
    parts = [part for part in spelled.replace("\\", '"').split('"') if part.isascii()]
    return bool(parts) and max(parts, key=len) in text


def test_the_same_seed_gives_the_same_rows(page, name):
    from tele_jax.data import tasks

    tasks.register(name, page)
    first, again, other = rows(name, 20), rows(name, 20), rows(name, 20, seed=1)
    assert all((a["targets"] == b["targets"]).all() for a, b in zip(first, again, strict=True))
    assert not all((a["targets"] == b["targets"]).all() for a, b in zip(first, other, strict=True))


def test_a_validation_split_holds_the_held_out_files(page, name, vocabulary):
    from tele_jax.data import tasks

    tasks.register(name, page)
    dataset = seqio.get_mixture_or_task(f"{name}.WebText").get_dataset(
        sequence_length=None, split="validation", shuffle=False, num_epochs=1
    )
    found = [vocabulary.decode(example["targets"].numpy().tolist()) for example in dataset]
    assert found == ["held out, and nothing else"] * 30


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_standard_tasks_are_mixed_into_rows_like_ours(page, name, vocabulary, kind):
    """And seqio's usual lengths cut what they name, and the loss weights with it."""
    from tele_jax.data import tasks

    def pairs(ds):
        return ds.map(lambda i: {"inputs": [4 + i, 5], "targets": [300 + i, 301]})

    def source(split, shuffle_files, seed=None):
        import tensorflow as tf

        return tf.data.Dataset.range(20).map(lambda i: tf.cast(i, tf.int32))

    feature = seqio.Feature(vocabulary, add_eos=True)
    features = {"inputs": seqio.Feature(vocabulary, add_eos=False), "targets": feature}
    seqio.TaskRegistry.add(
        f"{name}_qa",
        seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=[pairs, seqio.preprocessors.append_eos],
        output_features=features,
    )
    seqio.MixtureRegistry.add(f"{name}_users", [(f"{name}_qa", 1.0)])
    made = dataclasses.replace(page, kind=kind)
    tasks.register_mixture(f"{name}_rows", {f"{name}_users": 2.0}, made)
    (row,) = rows(f"{name}_rows", 1)
    end = vocabulary.eos_id
    for segment in (row["segment_ids"] == i for i in range(1, row["segment_ids"].max())):
        first = row["targets"][segment][0] - 4
        assert row["targets"][segment].tolist() == [4 + first, 5, 300 + first, 301, end]
        assert row["tokens"][segment].tolist() == [end, 4 + first, 5, 300 + first, 301]
        assert row["loss_weights"][segment].tolist() == [0, 0, 1, 1, 1]
    lengths = {"inputs": 4, "targets": 4}
    cut = seqio.get_mixture_or_task(f"{name}_rows").get_dataset(lengths, split="train", seed=0)
    row = {key: value.numpy() for key, value in next(iter(cut)).items()}
    whole = row["segment_ids"] == 1
    assert whole.sum() == 4 and row["loss_weights"][whole].tolist() == [0, 0, 1, 1]


def test_mistakes_in_a_mixture_are_named(page, name):
    from tele_jax.data import tasks

    tasks.register(name, page)
    with pytest.raises(UserError, match=rf"seqio already has a task or mixture '{name}'; choose another name"):
        tasks.register(name, page)
    with pytest.raises(UserError, match=rf"has no task '{name}\.WebTxt'; did you mean '{name}\.WebText'"):
        tasks.register_mixture(f"{name}_2", {f"{name}.WebTxt": 1.0}, page)
    for rate in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"the rate {rate} of .* must be above 0 and finite"):
            tasks.register_mixture(f"{name}_2", {f"{name}.WebText": rate}, page)
    law = page.data.sources["WebText"]
    twice = dataclasses.replace(page, data=dataclasses.replace(page.data, sources={"A-Law": law, "A_Law": law}))
    with pytest.raises(UserError, match=rf"A_Law: its task would be '{name}_3\.A_Law', which another domain has"):
        tasks.register(f"{name}_3", twice)
    assert not [task for task in seqio.TaskRegistry.names() if task.startswith(f"{name}_3")]


@pytest.mark.parametrize("rate", [-1, float("nan"), float("inf")])  # 0 leaves a domain out
def test_a_rate_that_cannot_be_is_refused_where_it_enters(rate):
    with pytest.raises(UserError, match="rate="):
        SourceConfig(files=("x",), rate=rate)

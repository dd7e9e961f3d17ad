"""Fine-tuning: epochs to the dialogue, copies of files, means over dialogues, and noise on the embedding."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.data import domains, sources
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh, put_batch
from tele_jax.stages import read_stage, run_config, sft
from tele_jax.train import metrics
from tele_jax.train.optimizer import optimizer, schedule
from tele_jax.train.step import make_step, state_shardings
from tests import reference
from tests.data import caches
from tests.data.conftest import Counting
from tests.inference.test_chat import tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIMIZER = {"learning_rate": 1e-3}


def stage(files, *, copies=None, **fields):
    """A stage over files by domain, of a vocabulary that numbers the tokens of every dialogue."""
    copies = copies or {}
    made = {n: {"files": [str(f)], "format": "dialogues", "copies": copies.get(n)} for n, f in files.items()}
    table = {"kind": "sft", "data": {"tokenizer": "counting", "sources": made}, "optimizer": OPTIMIZER}
    return read_stage({**table, "batch_size": 4, "seq_len": 24, **fields}, "config.sft")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two domains, of 40 and 25 dialogues of one turn, whose first tokens are numbers of their own."""
    monkeypatch.setattr(domains, "open_vocabulary", lambda data, kind: Counting())
    found, number = {}, 0
    for name, count in (("zh", 40), ("en", 25)):
        talks = []
        for _ in range(count):
            talks.append(caches.talk(f"{number + 1}:{1 + number % 5}", f"{number + 2}:{1 + number % 7}"))
            number += 2
        found[name] = caches.write_lines(tmp_path / f"{name}.jsonl", talks)
    return found


def read(opened, steps):
    """Counts the dialogues, by their first token, and the tokens that are learned, in the batches of a stage."""
    feed, seen, learned, batches = opened.feed(), collections.Counter(), 0, []
    for _ in range(steps):
        batch = next(feed)
        batches.append(batch)
        for segment in caches.segments(batch):
            seen[int(segment["tokens"][1])] += 1
        learned += int(batch["loss_weights"].sum())
    feed.close()
    return seen, learned, batches


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epochs", [1, 2.5, 3])
def test_an_epoch_has_every_dialogue_once(files, epochs, packed):
    opened = sft.batches(stage(files, epochs=epochs, packed=packed), sources.Indexes())
    steps = opened.count_steps()
    seen, learned, batches = read(opened, steps)
    assert len(seen) == 65 and sum(seen.values()) == round(65 * epochs)
    assert set(seen.values()) <= {int(epochs), int(np.ceil(epochs))}
    if epochs == 3:
        assert learned == 3 * sum(1 + 2 * i % 7 + 1 for i in range(65)), "every token of an answer, and its end"
    rows = [row for batch in batches for row in batch["segment_ids"] if row.any()]
    assert steps == -(-len(rows) // 4) and batches[-1]["segment_ids"].any(), "padding fills the last batch alone"
    if not packed:
        assert {batch["tokens"].shape[1] for batch in batches} <= set(range(3, 25, 3)), "an eighth of seq_len each"
        assert all(batch["tokens"].shape[1] - (batch["segment_ids"] > 0).sum(1).max() < 3 for batch in batches)
        assert len(rows) == round(65 * epochs) and max(row.max() for row in rows) == 1
    after, _, _ = read(opened, steps + 2)
    assert after == seen, "behind the last epoch there is nothing but padding"


def test_copies_are_whole_numbers_and_a_share(files):
    """The released weights of files: 1.42 is every dialogue once, and 42% of them a second time."""
    made = stage(files, copies={"zh": 1.42, "en": 0.6}, epochs=2)
    opened = sft.batches(made, sources.Indexes())
    seen, _, _ = read(opened, opened.count_steps())
    zh = collections.Counter(count for number, count in seen.items() if number < 80_000)
    en = collections.Counter(count for number, count in seen.items() if number >= 80_000)
    assert zh == {2: 40 - 17, 4: 17}, "17 = 42% of 40, the same in both epochs"
    assert en == {2: 15}, "15 = 60% of 25, the same in both epochs"


def test_a_killed_stage_goes_on_to_the_same_end(files):
    opened = sft.batches(stage(files, epochs=1.5), sources.Indexes())
    steps = opened.count_steps()
    whole = opened.feed()
    states, batches = [whole.state()], []
    for _ in range(steps + 1):
        batches.append(next(whole))
        states.append(whole.state())
    whole.close()
    for begin in (1, steps - 2, steps - 1, steps):  # among them places where rows are closed for the end
        again = opened.feed()
        again.restore(states[begin])
        for batch in batches[begin:]:
            assert caches.same(next(again), batch)
        again.close()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"epochs": 2, "steps": 3}, r"config\.sft\.steps and config\.sft\.epochs: both say how long the stage is"),
        ({}, r"config\.sft\.steps: missing; give it, or in fine-tuning epochs"),
        ({"epochs": 0}, r"config\.sft: epochs=0\.0 must be above 0"),
        ({"epochs": 1, "neftune_alpha": -1.0}, r"config\.sft: neftune_alpha=-1\.0 must not be negative"),
        ({"steps": 9, "neftune_alpha": 5.0, "mask_ramp": 3}, r"neftune_alpha and mask_ramp: noise would reach units"),
        ({"epochs": 1, "copies": {"zh": 2.0}}, r"sources: zh have copies, and en have none"),
    ],
)
def test_a_mistake_in_the_settings_is_named(files, fields, match):
    with pytest.raises(UserError, match=match):
        stage(files, **fields)


def test_epochs_of_what_has_none_are_refused(files):
    tiny = stage(files, epochs=1e-4)
    with pytest.raises(UserError, match=r"epochs=0\.0001: not one of 65 dialogues is read; give more"):
        sft.batches(tiny, sources.Indexes()).count_steps()
    rated = dataclasses.replace(stage(files, epochs=1).data.sources["zh"], rate=2.0)
    made = stage(files, epochs=1)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, sources={**made.data.sources, "zh": rated}))
    with pytest.raises(UserError, match=r"epochs: the domains zh have rates; give every domain copies instead"):
        sft.batches(made, sources.Indexes())


def test_rows_too_short_for_a_dialogue_are_named_as_what_they_are(files):
    with pytest.raises(UserError, match=r"^seq_len=2: a row of dialogues needs at least 3 tokens"):
        sft.batches(stage(files, steps=1, seq_len=2), sources.Indexes())


def test_a_feed_of_copies_is_named_by_its_domains(files):
    assert sft.batches(stage(files, epochs=1), sources.Indexes()).domains == ["en + zh"]


def test_the_mean_over_dialogues_gives_each_the_same_weight(files):
    made = stage(files, steps=3, mean_over="dialogues")
    _, _, plain = read(sft.batches(stage(files, steps=3), sources.Indexes()), 3)
    _, _, batches = read(sft.batches(made, sources.Indexes()), 3)
    for batch, before in zip(batches, plain, strict=True):
        assert (batch["tokens"] == before["tokens"]).all()
        for segment, old in zip(caches.segments(batch), caches.segments(before), strict=True):
            np.testing.assert_allclose(segment["loss_weights"], old["loss_weights"] / old["loss_weights"].sum())


# ------------------------------------------------------------------------------------------------------------- the loss

CFG = tele.ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=60, dtype="float32", input_mult=2.0,
    tie_embeddings=False,
)  # fmt: skip


def unequal_batch(rows=8, length=32):
    """Rows of several dialogues, of which very different numbers of tokens count."""
    rng = np.random.default_rng(5)
    segment_ids = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segment_ids[::3, length - 6 :] = 0
    begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
    places = np.arange(length) - np.maximum.accumulate(begins * np.arange(length), axis=1)
    weights = (rng.random((rows, length)) < np.linspace(0.02, 0.95, rows)[:, None]) * (segment_ids > 0)
    weights = weights * rng.choice([1.0, 0.25, 2.5], (rows, 1))
    return {
        "tokens": rng.integers(0, 60, (rows, length), np.int32),
        "targets": rng.integers(0, 60, (rows, length), np.int32),
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segment_ids,
        "positions": places.astype(np.int32),
    }


def settings(**fields):
    data = {"tokenizer": "t", "sources": {"a": {"files": ["f"], "format": "dialogues"}}}
    table = {"kind": "sft", "data": data, "optimizer": OPTIMIZER, "steps": 5, "batch_size": 8, "seq_len": 32}
    return read_stage(table | fields, "config.sft")


def test_the_noise_is_that_of_the_paper():
    """Uniform in +-alpha / sqrt(L d), L the length of the dialogue, and in the loss as the formula puts it there."""
    made = settings(neftune_alpha=5.0)
    batch = sft.prepare(made, unequal_batch(), np.arange(8, dtype=np.uint64))
    noise = np.asarray(sft.embedding_noise(batch["noise_seeds"], batch["segment_ids"], CFG.embed_dim), np.float64)
    for row in range(8):
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
            part = noise[row, batch["segment_ids"][row] == segment]
            uniform = part * np.sqrt(part.size)
            assert np.abs(uniform).max() <= 1
            if len(part) > 8:  # standard deviation 1/sqrt(3) within 5 standard errors, mean 0 likewise
                assert abs(uniform.std() - 3**-0.5) < 5 * 0.26 / np.sqrt(part.size)
                assert abs(uniform.mean()) < 5 * 0.58 / np.sqrt(part.size)
    params = tele.init(CFG, jax.random.key(1))
    total, weight, _ = sft.loss(made, CFG, params, batch)
    where = (batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = reference.forward(CFG, params, *where, noise=5.0 * noise)
    log_probabilities = np.log(reference.softmax(logits))
    found = -np.take_along_axis(log_probabilities, batch["targets"][..., None], axis=2)[..., 0]
    weights = batch["loss_weights"].astype(np.float64)
    np.testing.assert_allclose(float(total), (found * weights).sum(), rtol=2e-6)
    np.testing.assert_allclose(float(weight), weights.sum(), rtol=1e-6)
    quiet, _, _ = sft.loss(settings(), CFG, params, batch)
    assert abs(float(quiet) - float(total)) > 1e-3


def test_the_noise_is_another_in_every_row_and_step_and_again_the_same():
    made = settings(neftune_alpha=5.0)
    first, second = (sft.prepare(made, {}, np.arange(8 * i, 8 * i + 8, dtype=np.uint64))["noise_seeds"] for i in (0, 1))
    assert len({*first.tolist(), *second.tolist()}) == 16
    assert (sft.prepare(made, {}, np.arange(8, 16, dtype=np.uint64))["noise_seeds"] == second).all()
    other = sft.prepare(settings(neftune_alpha=5.0, seed=1), {}, np.arange(8, dtype=np.uint64))["noise_seeds"]
    assert not set(other.tolist()) & set(first.tolist())


def test_microbatches_and_devices_do_not_change_a_step():
    """1 x 8 = 8 x 1 = 2 x 4 rows, with unequal weights, and on 8 devices: loss to 1e-6, gradients to 1e-5."""
    made = settings(mean_over="dialogues", neftune_alpha=5.0)
    batch = sft.prepare(made, unequal_batch(), np.arange(8, dtype=np.uint64))
    found = []
    for shape, microbatches in (((1, 1, 1), 1), ((1, 1, 1), 8), ((1, 1, 1), 4), ((2, 2, 2), 1)):
        mesh = make_mesh(
            MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape))), jax.devices()[: int(np.prod(shape))]
        )
        tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-2), lambda step: 1.0)
        how = {"batch_size": 8, "microbatches": microbatches}
        step = make_step(CFG, tx, mesh, loss=lambda *a: sft.loss(made, *a), **how)
        shardings, opt_shardings = state_shardings(CFG, tx, mesh)
        params = jax.device_put(tele.init(CFG, jax.random.key(0)), shardings)
        opt_state = jax.device_put(tx.init(params), opt_shardings)
        _, opt_state, figures = step(params, opt_state, put_batch(batch, mesh, 8))
        moments = [np.asarray(leaf) for leaf in jax.tree.leaves(opt_state) if leaf.ndim > 1]  # 0.1 of the gradient
        found.append((float(figures["loss"]), float(figures["grad_norm"]), moments))
    for loss, grad_norm, moments in found[1:]:
        assert abs(loss - found[0][0]) < 1e-6 * found[0][0]
        assert abs(grad_norm - found[0][1]) < 1e-5 * found[0][1]
        for ours, first in zip(moments, found[0][2], strict=True):
            np.testing.assert_allclose(ours, first, rtol=0, atol=1e-5 * np.abs(first).max())


def test_a_warm_up_may_be_a_share_of_the_stage():
    made = settings(schedule={"kind": "cosine", "warmup_share": 0.1, "final": 0.0})
    factor = schedule(made.schedule, 200, 1)
    same = schedule(dataclasses.replace(made.schedule, warmup_share=0.0, warmup=20), 200, 1)
    assert [float(factor(i)) for i in range(0, 200, 7)] == [float(same(i)) for i in range(0, 200, 7)]
    with pytest.raises(UserError, match="warmup and warmup_share: give one of the two"):
        settings(schedule={"warmup": 3, "warmup_share": 0.1})


# ------------------------------------------------------------------------------------------------------------- the run


def test_a_run_counts_its_epochs_and_may_have_more_of_them(tmp_path):
    text = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(50)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    data = {"tokenizer": str(tmp_path / "tokenizer.model")}
    data |= {"sources": {"talk": {"files": [str(tmp_path / "d.jsonl")], "format": "dialogues"}}}
    model = {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "head_dim": 8, "mlp_dim": 8, "vocab_size": 600}
    page = {"run": ["sft"], "sft": {"kind": "sft", "model": model | {"dtype": "float32"}, "data": data, "epochs": 2}}
    page["sft"] |= {"batch_size": 4, "seq_len": 32, "optimizer": OPTIMIZER, "log_every": 1, "neftune_alpha": 5.0}
    page["sft"] |= {"schedule": {"kind": "constant"}, "mean_over": "dialogues"}
    (summary,) = tele.run(page, tmp_path / "w")
    steps = sft.batches(run_config(page).stages["sft"], sources.Indexes()).count_steps()
    learned = sum(len(str(i)) + 2 for i in range(50))  # digits, the full stop and the end of every answer
    assert learned <= summary["tokens"] / 2 <= 2 * learned
    assert summary["steps"] == steps == metrics.read(tmp_path / "w/sft/metrics/metrics.jsonl")[-1]["step"]
    page["sft"]["epochs"] = 3
    (longer,) = tele.run(page, tmp_path / "w")
    assert longer["steps"] > steps
    assert json.loads((tmp_path / "w/config.json").read_text())["sft"]["steps"] is None

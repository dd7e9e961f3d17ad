"""A packed batch teaches exactly what its examples teach one by one."""

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.data import packing
from tele_jax.model.loss import next_token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=48, vocab_size=97, dtype="float32", remat="none"
)
PAD, SEPARATOR, SEQ_LEN = 3, 2, 48


def examples(rng, count, longest):
    made = []
    for _ in range(count):
        ids = rng.integers(4, 97, rng.integers(2, longest))
        made.append(np.array([ids[:-1], ids[1:], rng.integers(0, 2, len(ids) - 1)], np.int32))
    return made


@jax.jit
def loss(params, batch):
    return next_token_loss(CFG, params, batch, None)


def losses(params, rows):
    """(sum, weight) of some rows, one row at a time: one shape to compile."""
    return np.sum([loss(params, packing.to_batch(row[None])) for row in rows], axis=0).tolist()


@pytest.mark.parametrize("seed", range(2))
def test_the_loss_of_packed_dialogues_is_the_weighted_mean_of_each_alone(seed):
    rng = np.random.default_rng(seed)
    params = tele.init(CFG, jax.random.key(seed))
    made = examples(rng, 20, SEQ_LEN)
    left, full = packing.fit_rows(packing.empty_rows(4, SEQ_LEN, PAD), made, pad_id=PAD)
    total, weight = losses(params, np.concatenate([full, left]))
    alone = [packing.fit_rows(packing.empty_rows(1, SEQ_LEN, PAD), [each], pad_id=PAD)[0] for each in made]
    apart = np.array([losses(params, rows) for rows in alone])
    assert weight == apart[:, 1].sum() == sum(each[2].sum() for each in made)
    assert total / weight == pytest.approx(apart[:, 0].sum() / apart[:, 1].sum(), rel=1e-5)


def test_the_loss_of_cut_documents_is_the_weighted_mean_of_their_segments():
    rng = np.random.default_rng(7)
    params = tele.init(CFG, jax.random.key(7))
    made = examples(rng, 12, 120)
    lengths = np.array([each.shape[1] for each in made])
    left, full = packing.cut_rows(
        packing.empty_rows(1, SEQ_LEN, PAD), np.concatenate(made, axis=1), lengths, separator=SEPARATOR, pad_id=PAD
    )
    rows = np.concatenate([full, left])
    total, weight = losses(params, rows)
    parts = [
        row[:3, row[packing.SEGMENT_IDS] == number]
        for row in rows
        for number in range(1, row[packing.SEGMENT_IDS].max() + 1)
    ]
    assert len(parts) > len(made), "some are cut"
    alone = [packing.fit_rows(packing.empty_rows(1, SEQ_LEN, PAD), [part], pad_id=PAD)[0] for part in parts]
    apart = np.array([losses(params, rows) for rows in alone])
    assert weight == apart[:, 1].sum() == sum(each[2].sum() for each in made)
    assert total / weight == pytest.approx(apart[:, 0].sum() / apart[:, 1].sum(), rel=1e-5)

"""What was counted in the programs of docs/scale.md, against the FLOPs of the models by their dimensions."""

import json
from pathlib import Path

import pytest

import tele_jax as tele

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks" / "aot_table.json").read_text())
LENGTH, QUERIES, KEYS = 4096, 512, 1024  # tokens of a sequence; rows and columns of a block of the attention kernels


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("train ")])
def test_a_compiled_step_has_the_flops_that_its_model_and_its_remat_policy_need(name):
    """A loop that is counted by too many turns, as one whose counter steps by two, would not give these."""
    row = ROWS[name]
    cfg = tele.get_model(row["model"])
    heads = cfg.num_heads * cfg.head_dim
    mlp = cfg.embed_dim * cfg.mlp_dim
    block = 4 * cfg.embed_dim * heads + 3 * mlp
    # Forward 2 FLOPs for a weight and a token, backward 4. What is computed again is 2, but nobody needs the last
    # product of a block, the way down from the mlp, a second time.
    again = 0 if row["remat"] == "products" else 2 * (block - mlp)
    token = cfg.num_layers * (6 * block + again) + 6 * cfg.embed_dim * cfg.padded_vocab_size
    sequences = row["batch_size"] / row["devices"]
    assert row["flops"]["matmul"] == pytest.approx(token * LENGTH * sequences, rel=1e-9)

    # Kernels compute whole blocks, of which those above the diagonal are left out: two products forward, five backward.
    forward = sum(QUERIES * QUERIES for i in range(LENGTH // QUERIES) for j in range(LENGTH // QUERIES) if j <= i)
    backward = sum(
        QUERIES * KEYS for i in range(LENGTH // QUERIES) for j in range(LENGTH // KEYS) if j * KEYS < (i + 1) * QUERIES
    )
    products = 2 * forward * (2 if row["remat"] == "full" else 1) + 5 * backward
    expected = 2 * products * heads * cfg.num_layers * sequences
    assert row["flops"]["attention"] == pytest.approx(expected, rel=1e-9)

"""Small models and their state for the tests of checkpoints."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tele_jax as tele
from tele_jax.axes import flatten

CFG = tele.ModelConfig(
    num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, vocab_size=40, rope=tele.Rope(5e5)
)


def params(cfg: tele.ModelConfig = CFG, seed: int = 0) -> dict[str, Any]:
    """Normal numbers; tele.init compiles, which the tests here need not wait for."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), leaf.dtype), tele.spec(cfg))


def assert_same(found: Any, expected: Any) -> None:
    """Same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


def chunk_files(step_dir: Path, leaf: str) -> list[Path]:
    """Every chunk file of a leaf such as params/layers.attn.q, found by listing the directory."""
    return sorted(file for file in (step_dir / leaf).rglob("*") if file.is_file() and file.name != "zarr.json")


def all_bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def total_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in flatten(tree).values())

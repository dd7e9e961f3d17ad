"""Makes the archive beside this file: what one version leaves on disk, for later versions to read.

    python tests/made_before/make.py VERSION

Run in a checkout of that version, with its own code installed. The text is random words.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

PAGE = """
from ml_collections import ConfigDict


def get_config():
    model = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=400, max_seq_len=64)
    model |= dict(dtype="float32", remat="none", mup_base_width=8)
    files = dict(files=("text.jsonl",), validation_files=("held_out.jsonl",), format="jsonl")
    data = dict(tokenizer="tokenizer.model", sources=dict(text=files))
    cached = dict(tokenizer="tokenizer.model", cache="cache")
    every = dict(steps=8, batch_size=4, seq_len=16, log_every=1, eval_every=4, checkpoint_every=4, keep_checkpoints=2)
    optimizer = dict(learning_rate=1e-3, matrix_learning_rate=4e-3)
    config = ConfigDict()
    config.run = ("small", "grow", "large", "rows")
    config.small = dict(kind="pretrain", model=model, data=data, optimizer=optimizer, **every)
    config.grow = dict(kind="grow", policy="msg", layers="distance", model=dict(num_layers=3, embed_dim=20, mlp_dim=31))
    config.large = dict(kind="pretrain", data=data, mask_ramp=4, optimizer=optimizer, **every)
    config.rows = dict(kind="pretrain", data=cached, optimizer=optimizer, **every)
    return config
"""
CACHE = """
from ml_collections import ConfigDict


def get_config():
    files = dict(files=("text.jsonl",), validation_files=("held_out.jsonl",), format="jsonl")
    data = dict(tokenizer="tokenizer.model", sources=dict(text=files))
    return ConfigDict(dict(data=data, seq_len=16))
"""
GROWTH = """
from ml_collections import ConfigDict


def get_config():
    larger = dict(num_layers=4, embed_dim=24, num_heads=3, mlp_dim=40)
    return ConfigDict(dict(grow=dict(kind="grow", policy="exact", model=larger)))
"""


def digests(checkpoint_module, path) -> dict:
    """SHA-256 of the numbers of every parameter, in the order of memory."""
    import numpy as np

    from tele_jax.axes import flatten

    loaded = checkpoint_module.load(path)
    return {
        name: hashlib.sha256(np.ascontiguousarray(np.asarray(value)).tobytes()).hexdigest()
        for name, value in sorted(flatten(loaded.params).items())
    }


def make(here: Path) -> None:
    from tele_jax import checkpoint, growth
    from tele_jax.cli.main import main
    from tele_jax.data import vocabulary_training

    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(60)]
    texts = [f"{i} {' '.join(rng.choices(words, k=rng.randint(2, 12)))}" for i in range(120)]
    trained = vocabulary_training.train_vocabulary(texts, preset="tele_flm", vocab_size=400)
    vocabulary_training.write_vocabulary(trained, here / "tokenizer.model", preset="tele_flm")
    (here / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    (here / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[40:60]))
    for name, page in (("page.py", PAGE), ("cache_page.py", CACHE), ("growth_page.py", GROWTH)):
        (here / name).write_text(page)

    def tele_command(*words: str) -> None:
        if main(list(map(str, words))) != 0:
            raise SystemExit(f"failed: tele {' '.join(map(str, words))}")

    tele_command("data", "cache", "--config", here / "cache_page.py", "--out", here / "cache", "--runner", "serial")
    tele_command("train", "--config", here / "page.py", "--workdir", here / "run")
    grown = here / "run/small"
    tele_command("grow", grown, here / "grown", "--config", here / "growth_page.py", "--opt", "--workers", "2")
    tele_command("export", here / "grown", here / "release", "--format", "tele_flm")
    tele_command("import", here / "release", here / "imported")
    cfg = checkpoint.open_lazy(grown).cfg
    first = growth.plan(cfg, cfg.replace(num_layers=3, mlp_dim=30), policy="exact", seed=3)
    second = growth.plan(first.dst_cfg, first.dst_cfg.replace(embed_dim=24), policy="exact", seed=4)
    plan = growth.compose(first, second)
    (here / "composed_plan.json").write_text(json.dumps(plan.to_json()))
    checkpoint.save(here / "composed", plan.dst_cfg, growth.apply(plan, checkpoint.load(grown).params))

    places = ("run/small", "run/grow", "run/large", "run/rows", "grown", "imported", "composed")
    losses = {}
    for stage in ("small", "large", "rows"):
        lines = (here / "run" / stage / "metrics/metrics.jsonl").read_text().splitlines()
        losses[stage] = [[line["step"], line["loss"]] for line in map(json.loads, lines) if "loss" in line]
    expected = {"params": {place: digests(checkpoint, here / place) for place in places}, "losses": losses}
    (here / "expected.json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    target = Path(__file__).parent.resolve() / f"{sys.argv[1]}.tar.xz"
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "made"
        made.mkdir()
        os.chdir(made)  # paths that are kept are relative
        make(Path())
        shutil.rmtree(made / "release")
        for pattern in ("events.out.tfevents.*", "*.png", "*.html"):
            for path in made.rglob(pattern):
                path.unlink()
        with tarfile.open(target, "w:xz") as archive:
            archive.add(made, "made")
    print(target, target.stat().st_size, "bytes")

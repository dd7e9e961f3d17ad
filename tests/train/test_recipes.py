"""One step of each published recipe of fine-tuning against torch, which sees every dialogue by itself."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tele_jax import convert
from tele_jax.cli.pages import load_page
from tele_jax.data import sources
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, put_batch
from tele_jax.stages import run_config, sft
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import make_step, state_shardings
from tests.convert import releases
from tests.inference.test_chat import tokenizer_bytes

torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'tele_jax[hf]'")
safetensors = pytest.importorskip("safetensors.numpy")

from tests.convert import torch_models  # noqa: E402
from tests.convert.test_parity import tensors_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAGE = Path(__file__).parents[2] / "configs" / "sft.py"
ROWS, LENGTH = 4, 64
WORDS = ["The cat sat", " on the mat. ", "def f(x):", "return x + 1", "画蛇添足", "是什么意思？", "多了余的事。"]


def write_dialogues(path, count, rng):
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = lambda: "".join(rng.choice(WORDS, rng.integers(1, 3)))  # noqa: E731
            turns = [(role, text()) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def recipe(name, tmp_path):
    """The first stage of a recipe, on dialogues and a tokenizer of our own, in small."""
    config = run_config(load_page(f"{PAGE}:{name}"))
    stage = config.stages[config.run[0]]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    rng, own = np.random.default_rng(0), {}
    for domain, source in stage.data.sources.items():
        write_dialogues(tmp_path / f"{domain}.jsonl", 30, rng)
        own[domain] = dataclasses.replace(source, files=(str(tmp_path / f"{domain}.jsonl"),))
    data = dataclasses.replace(stage.data, tokenizer=str(tmp_path / "tokenizer.model"), sources=own)
    return dataclasses.replace(stage, data=data, batch_size=ROWS, seq_len=LENGTH)


def learned_by_the_rule(tokens, targets, vocabulary, next_user):
    """Which targets count, from the ids alone: inputs from <_bot> to <_end> count, and what comes after them."""
    counted, inside = [], False
    for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        inside = token == vocabulary.bot_id or (inside and token != vocabulary.user_id)
        counted.append(inside and (next_user or target != vocabulary.user_id))
    return np.array(counted)


def torch_step(model, weights, batch, noise, vocabulary, next_user):
    """Loss, and gradients by name, of every segment by itself: no packing, no microbatches."""
    total, count = 0.0, 0
    for row, ids in enumerate(batch["segment_ids"]):
        for number in range(1, int(ids.max()) + 1):
            part = ids == number
            tokens, targets = batch["tokens"][row, part], batch["targets"][row, part]
            counted = torch.from_numpy(learned_by_the_rule(tokens, targets, vocabulary, next_user))
            own_noise = torch.from_numpy(noise[row, part][None]) if noise is not None else 0.0
            logits = model(torch.from_numpy(tokens[None]).long(), own_noise)[0].double()
            losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long(), reduction="none")
            total = total + losses[counted].sum()
            count += int(counted.sum())
    loss = total / count
    loss.backward()
    gradients = {name: w.grad.double().numpy() for name, w in weights.items() if w.grad is not None}
    return float(loss.detach()), count, gradients


def peer(name, tmp_path):
    """(cfg, params, model(tokens, noise) -> logits, its weights by released name)."""
    if name == "tele_flm":
        config, values = releases.llama(seed=1)
    else:
        config, values = releases.telechat(seed=1, tied=False, prefix="transformer.")
    cfg, params = convert.load_hf(releases.save(tmp_path / "release", config, values))
    if name == "tele_flm":
        known = {
            key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")
        }
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**known, attn_implementation="eager"))
        llama.load_state_dict(tensors_of(values))
        weights = dict(llama.named_parameters())
        model = lambda tokens, noise: llama(inputs_embeds=llama.model.embed_tokens(tokens) + noise).logits  # noqa: E731
    else:
        weights = {n: w.requires_grad_() for n, w in tensors_of(values).items() if w.is_floating_point()}
        model = lambda tokens, noise: torch_models.telechat(config, weights, tokens, LENGTH, noise=noise)  # noqa: E731
    return cfg.replace(remat="none", param_dtype="float32", dtype="float32"), params, model, weights


@pytest.mark.parametrize("name", ["tele_flm", "telechat", "telechat2"])
def test_a_step_of_a_recipe_is_that_of_torch(name, tmp_path, monkeypatch):
    monkeypatch.setattr(releases, "V", 448)  # the tokenizer has 440 ids
    stage = recipe(name, tmp_path)
    cfg, params, model, weights = peer(name, tmp_path)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "float32"), params)
    vocabulary = load_vocabulary(stage.data.tokenizer)
    feed = sft.batches(stage, sources.Indexes()).feed()
    batch = next(feed)
    feed.close()
    segments = batch["segment_ids"].max(axis=1)
    assert (segments == 1).all() if name == "tele_flm" else segments.max() > 1, "packed, or one dialogue in a row"
    noise = None
    if stage.neftune_alpha:
        noise = stage.neftune_alpha * np.asarray(
            sft.embedding_noise(batch["noise_seeds"], batch["segment_ids"], cfg.embed_dim)
        )
    loss, count, expected = torch_step(model, weights, batch, noise, vocabulary, stage.data.dialogues.next_user)

    # Both groups of the recipe have one rate at the muP width of the base model, and so they have here.
    rate = stage.optimizer.learning_rate
    chosen = dataclasses.replace(stage.optimizer, matrix_learning_rate=rate * cfg.width_ratio)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(cfg, chosen, lambda step: 1.0)
    step = make_step(cfg, tx, mesh, batch_size=ROWS, loss=lambda *a: sft.loss(stage, *a))
    shardings, opt_shardings = state_shardings(cfg, tx, mesh)
    before = jax.tree.map(np.asarray, params)
    state = jax.device_put(tx.init(params), opt_shardings)
    after, state, figures = step(jax.device_put(params, shardings), state, put_batch(batch, mesh, ROWS))
    assert int(figures["counted"]) == count
    assert float(figures["loss"]) == pytest.approx(loss, rel=1e-6)
    norm = np.sqrt(sum((g**2).sum() for g in expected.values()))
    assert float(figures["grad_norm"]) == pytest.approx(norm, rel=1e-5)

    # The first moment is 1 - beta1 of the clipped gradient. Exported as if it were a model, it has the released names.
    moments = next(
        part.mu for part in jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(part, "mu")
    )
    clipped = min(1.0, stage.optimizer.clip_norm / norm)
    format = "llama" if name == "tele_flm" else "telechat"

    def released(tree, directory):
        convert.save_hf(tmp_path / directory, cfg, jax.tree.map(np.asarray, tree), format=format)
        tensors: dict = {}
        for file in (tmp_path / directory).glob("*.safetensors"):
            tensors |= safetensors.load_file(file)
        return {key: value.astype(np.float64) for key, value in tensors.items()}

    ours, old, new = (released(t, d) for t, d in ((moments, "gradients"), (before, "before"), (after, "after")))
    assert set(ours) >= set(expected) and len(expected) > 10
    for key, gradient in expected.items():
        gradient = gradient * clipped
        found = ours[key] / (1 - stage.optimizer.beta1)
        assert np.linalg.norm(found - gradient) <= 1e-4 * np.linalg.norm(gradient), key
        # AdamW from torch's gradient (arXiv 1711.05101), where float32 resolves its sign and size.
        decay = stage.optimizer.weight_decay if gradient.ndim > 1 else 0.0
        update = rate * (gradient / (np.abs(gradient) + stage.optimizer.eps) + decay * old[key])
        sure = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        np.testing.assert_allclose((old[key] - new[key])[sure], update[sure], rtol=2e-2, atol=3e-7)

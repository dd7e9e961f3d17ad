"""tele_jax: pretrain, grow, fine-tune and talk to the Tele-FLM and TeleChat model series in JAX.

cfg = tele.ModelConfig(...)                  config of a model            tele_jax/config.py
cfg = tele.get_model("tele_flm_52b")         a published one              tele_jax/published.py
params = tele.init(cfg, key)                 nested dict of arrays        tele_jax/model/decoder.py
logits = tele.forward(cfg, params, tokens)
spec = tele.spec(cfg)                        shapes and axis names        tele_jax/model/spec.py
tokens = tele.generate(cfg, params, prompts, max_new_tokens=64)           tele_jax/inference/generate.py
scores = tele.score(cfg, params, prompts, continuations)                  tele_jax/inference/score.py
tele.run(config, workdir)                    what `tele train` does       tele_jax/report/
tele.growth                                  grow parameter trees         tele_jax/growth/
tele.surgery                                 take, drop, cut, pad, rename tele_jax/growth/surgery.py
tele.lora                                    low-rank adapters            tele_jax/model/adapters.py
tele.losses                                  of DPO, PPO, GRPO            tele_jax/losses.py
tele.checkpoint                              save and load                tele_jax/checkpoint/
tele.plots                                   losses, plans, receipts      tele_jax/plots.py
tele.convert                                 released checkpoints         tele_jax/convert/
"""

import importlib
from typing import TYPE_CHECKING

from tele_jax import _command  # noqa: F401 (first: it is there while the others load)
from tele_jax.axes import ParamSpec
from tele_jax.config import ModelConfig, Ntk, Rope
from tele_jax.errors import DamageError, UserError
from tele_jax.inference.generate import generate
from tele_jax.model import adapters as lora
from tele_jax.model.decoder import forward, init
from tele_jax.model.spec import count_params, spec
from tele_jax.published import get_model

if TYPE_CHECKING:
    from tele_jax import checkpoint, convert, growth, losses, plots
    from tele_jax.growth import surgery
    from tele_jax.inference.score import score
    from tele_jax.report import run

__all__ = [
    "DamageError",
    "ModelConfig",
    "Ntk",
    "ParamSpec",
    "Rope",
    "UserError",
    "checkpoint",
    "convert",
    "count_params",
    "forward",
    "generate",
    "get_model",
    "growth",
    "init",
    "lora",
    "losses",
    "plots",
    "run",
    "score",
    "spec",
    "surgery",
]


def __getattr__(name: str):
    """Loads the heavier parts on first use, so that `import tele_jax` stays light."""
    if name == "surgery":
        return importlib.import_module("tele_jax.growth.surgery")
    if name == "score":
        return importlib.import_module("tele_jax.inference.score").score
    if name == "run":
        return importlib.import_module("tele_jax.report").run
    if name in ("growth", "checkpoint", "convert", "losses", "plots"):
        return importlib.import_module(f"tele_jax.{name}")
    raise AttributeError(f"module 'tele_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

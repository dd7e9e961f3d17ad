"""A model at other widths and depths: the muP family that it belongs to."""

from tele_jax.config import ModelConfig, require
from tele_jax.errors import UserError
from tele_jax.settings import TrainStage
from tele_jax.stages import RunConfig


def at_width(cfg: ModelConfig, width: int) -> ModelConfig:
    """The config at another width: heads and mlp grow with embed, and channels of a head, layers and all else stay.

    >>> cfg = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=160, vocab_size=256)
    >>> larger = at_width(cfg, 256)
    >>> larger.num_heads, larger.head_dim, larger.mlp_dim
    (16, 16, 640)

    Raises:
      UserError: a width at which heads or mlp would be no whole numbers.
    """
    require(width > 0, f"width={width} must be above 0")
    sizes = {"embed_dim": width}
    for name in ("num_heads", "num_kv_heads", "mlp_dim"):
        size, rest = divmod(getattr(cfg, name) * width, cfg.embed_dim)
        require(
            not rest,
            f"width={width}: {name}={getattr(cfg, name)} at width {cfg.embed_dim} would be no whole number there",
        )
        sizes[name] = size
    return cfg.replace(**sizes)


def at_depth(cfg: ModelConfig, layers: int) -> ModelConfig:
    """The config with another number of layers and residual_mult in inverse proportion (CompleteP, arXiv 2505.01618).

    >>> cfg = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=160, vocab_size=256)
    >>> at_depth(cfg, 8).residual_mult
    0.25

    Raises:
      UserError: no layers.
    """
    require(layers > 0, f"layers={layers} must be above 0")
    return cfg.replace(num_layers=layers, residual_mult=cfg.residual_mult * cfg.num_layers / layers)


def first_stage(config: RunConfig) -> tuple[TrainStage, ModelConfig]:
    """The stage of a run that begins with a new model, and that model; raises UserError where there is none."""
    stage = config.stages[config.run[0]]
    if not isinstance(stage, TrainStage) or stage.model is None:
        raise UserError(f"config.{config.run[0]}: muP needs a page whose first stage trains a new model (model=...)")
    return stage, stage.model

"""What a format has no place for, folded into the weights: multipliers and padding rows of the vocabulary."""

import dataclasses
import math

from tele_jax.config import ModelConfig, Ntk, require
from tele_jax.errors import UserError

# How the formats differ: which code reads them decides what they can express.
WITH_MULTIPLIERS = ("tele_flm", "telechat_52b")
WITH_OUTPUT_BIASES = ("telechat", "llama")
_OTHER = "; llama can hold it"


@dataclasses.dataclass(frozen=True)
class Folded:
    """cfg: the model as the file has it. factors: of the leaves that are not copied as they are."""

    cfg: ModelConfig
    factors: dict[str, float]

    @property
    def is_exact(self) -> bool:
        """Whether every factor is a power of two, which changes no digit of a binary number."""
        return all(math.frexp(factor)[0] == 0.5 for factor in self.factors.values())


def fold(cfg: ModelConfig, format: str) -> Folded:
    """The model without what the format has no place for. The same function, written otherwise:

    multipliers   the embedding table takes input_mult, the final norm's scale the multiplier of the logits; divided by
                  input_mult where the embedding is tied, because there the table multiplies the logits as well
    padding       rows of the vocabulary from vocab_size on are left out (llama only; the others have them as released)

    Raises:
      UserError: something else that the format cannot express; says what, and what to do.
    """
    require_expressible(cfg, format)
    factors = {}
    if format not in WITH_MULTIPLIERS:
        factors = {
            "embed.table": cfg.input_mult,
            "final_norm.scale": cfg.logit_mult / (cfg.input_mult if cfg.tie_embeddings else 1.0),
        }
        cfg = cfg.replace(input_mult=1.0, output_mult=1.0, mup_base_width=None)
    if format == "llama":
        cfg = cfg.replace(padded_vocab_size=cfg.vocab_size)
    return Folded(cfg, {leaf: factor for leaf, factor in factors.items() if factor != 1.0})


def require_expressible(cfg: ModelConfig, format: str) -> None:
    """Raises UserError for a model that the code which reads the format cannot run."""
    where = f"format {format}"
    require(not cfg.embed_norm, f"{where}: has no norm after the embedding, as this model does (embed_norm)")
    require(
        cfg.rope.tables == "float32" or format == "telechat",
        f"{where}: rotary tables rounded to float16 (rope.tables) are TeleChat's alone; import with --rope-tables "
        "float32 for a model that any code runs",
    )
    width = cfg.num_heads * cfg.head_dim
    require(
        width == cfg.embed_dim or format == "llama",
        f"{where}: takes head_dim = embed_dim / num_heads, but here {cfg.num_heads} heads of {cfg.head_dim} are not "
        f"embed_dim={cfg.embed_dim}{_OTHER}",
    )
    if cfg.output_biases and format not in WITH_OUTPUT_BIASES:
        raise UserError(f"{where}: has no biases, as this model does (output_biases){_OTHER}")
    if format == "telechat":
        _require_telechat(cfg, where)
        return
    if format == "telechat_52b":
        require(cfg.num_kv_heads == cfg.num_heads, f"{where}: has no grouped queries{_OTHER}")
        require(not cfg.tie_embeddings, f"{where}: has no tied embedding{_OTHER}")
        require(
            cfg.rope.ntk == NTK_52B or (_is_constant(cfg) and cfg.max_seq_len <= NTK_52B.trained_length),
            f"{where}: beyond 4,096 tokens its rotary base is multiplied by alpha, this model has {cfg.rope} and "
            f"max_seq_len={cfg.max_seq_len:,}",
        )
        return
    constant_theta(cfg, where)


# TeleChat-52B beyond 4,096 positions, as its released code has it.
NTK_52B = Ntk(original_length=4096, trained_length=4096, base="linear", attention_slope=0.0)


def constant_theta(cfg: ModelConfig, where: str) -> float:
    """The one rotary base of a model up to its max_seq_len.

    Raises:
      UserError: its NTK scaling changes the base or the tables below that length.
    """
    if not _is_constant(cfg):
        raise UserError(
            f"{where}: cannot express TeleChat's NTK scaling, which changes the rotary base from "
            f"{cfg.rope.ntk.trained_length:,} tokens on, while this model's max_seq_len is {cfg.max_seq_len:,}; "
            f"with --max-seq-len {cfg.rope.ntk.trained_length} it can be exported for texts up to that length"
        )
    return cfg.rope_length_factors(1)[0]


def _is_constant(cfg: ModelConfig) -> bool:
    return cfg.rope_length_factors(cfg.max_seq_len) == cfg.rope_length_factors(1)


def _require_telechat(cfg: ModelConfig, where: str) -> None:
    require(cfg.output_biases, f"{where}: has biases on dense and down_proj, this model has none{_OTHER}")
    ntk = cfg.rope.ntk
    right = cfg.rope.theta == 10_000.0 and ntk is not None and ntk.base == "ntk" and ntk.attention_slope == 0.1
    require(
        right,
        f"{where}: its code takes theta 10,000 and NTK scaling with an attention slope of 0.1, this model has "
        f"{cfg.rope}{_OTHER if ntk is None else ''}",
    )

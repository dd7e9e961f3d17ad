"""The published models, one line each: sizes, multipliers and vocabularies from the reports and released configs.

A value that nobody published is marked "ours" with the reason. Numbers and their sources: docs/facts.md.
"""

import difflib
import math

from tele_jax.config import ModelConfig, Ntk, Rope, require
from tele_jax.errors import UserError
from tele_jax.files import Table

# Tele-FLM (arXiv 2404.16645, 2407.02783): init std and learning rates transfer back to muP base width 256, where the
# matrix-like std is 0.024; the vector-like std of 4e-3 is the same at every width.
_TELE_FLM = dict(
    **dict(head_dim=128, vocab_size=80_000, max_seq_len=4096, rms_eps=1e-5),
    **dict(init_std=4e-3, matrix_init_std=0.024, mup_base_width=256),
)
# The base model was released with output_mult 0.5 and mup_scale_factor 16, its width over that of the proxy. It is the
# same model as 1.0 / 32 at base width 256, the form of the later releases: in muP a matrix-like std or learning rate
# at base width 512 is that at 256 divided by sqrt(2), or by 2.
_TELE_FLM_BASE = _TELE_FLM | dict(output_mult=0.5, mup_base_width=512, matrix_init_std=0.024 / math.sqrt(2))
# TeleChat (arXiv 2401.03804): the init std was not published; 0.02 is ours, the usual value.
_TELECHAT = dict(max_seq_len=8192, rms_eps=1e-5, output_biases=True, init_std=0.02)
_NTK_7B = Rope(ntk=Ntk(original_length=4096))
_NTK_12B = Rope(ntk=Ntk(original_length=8192))
# TeleChat-52B: beyond 4,096 positions the base is multiplied by alpha itself, without factor on cos and sin.
_NTK_52B = Rope(ntk=Ntk(original_length=4096, trained_length=4096, base="linear", attention_slope=0.0))

PUBLISHED: dict[str, Table] = {
    # The proxy's effective multiplier is the transferred one, 1/32 * 8192/512.
    "tele_flm_proxy": _TELE_FLM_BASE | dict(num_layers=64, num_heads=4, embed_dim=512, mlp_dim=1_344),
    "tele_flm_52b": _TELE_FLM_BASE
    | dict(num_layers=64, num_heads=64, embed_dim=8_192, mlp_dim=21_824, padded_vocab_size=80_384),
    "tele_flm_52b_instruct": _TELE_FLM
    | dict(num_layers=64, num_heads=64, embed_dim=8_192, mlp_dim=21_824, padded_vocab_size=80_896),
    # The 102B was not released: the padded vocabulary is ours, the base model's.
    "tele_flm_102b": _TELE_FLM
    | dict(num_layers=80, num_heads=80, embed_dim=10_240, mlp_dim=27_264, padded_vocab_size=80_384),
    "tele_flm_1t": _TELE_FLM
    | dict(num_layers=140, num_heads=160, embed_dim=20_480, mlp_dim=98_304, padded_vocab_size=81_920, output_mult=2.0),
    # The 1B's vocabulary is not published; 160,256 is ours, that of the 7B.
    "telechat_1b": _TELECHAT
    | dict(num_layers=16, num_heads=32, head_dim=64, embed_dim=2_048, mlp_dim=5_460, vocab_size=160_256, rope=_NTK_7B),
    # The 3B's mlp is not published (12,288 fits the name), nor whether its embedding is tied: ours, as in the 7B.
    "telechat_3b": _TELECHAT
    | dict(
        num_layers=14,
        num_heads=16,
        head_dim=256,
        embed_dim=4_096,
        mlp_dim=12_288,
        vocab_size=160_256,
        rope=_NTK_7B,
        tie_embeddings=True,
    ),
    "telechat_7b": _TELECHAT
    | dict(
        num_layers=30,
        num_heads=32,
        head_dim=128,
        embed_dim=4_096,
        mlp_dim=12_288,
        vocab_size=160_256,
        rope=_NTK_7B,
        tie_embeddings=True,
    ),
    "telechat_12b": _TELECHAT
    | dict(
        num_layers=38, num_heads=32, head_dim=160, embed_dim=5_120, mlp_dim=12_288, vocab_size=120_000, rope=_NTK_12B
    ),
    "telechat_52b": _TELE_FLM
    | dict(num_layers=64, num_heads=64, embed_dim=8_192, mlp_dim=21_824, padded_vocab_size=80_896, rope=_NTK_52B),
}

# Tokens of the stage that trained each (arXiv 2404.16645, 2407.02783, 2401.03804); the others' were not published.
STAGE_TOKENS = {
    "tele_flm_52b": 2.0e12,
    "tele_flm_102b": 0.3e12,
    "tele_flm_1t": 15.7e9,
    "telechat_1b": 2.0e12,
    "telechat_7b": 1.5e12,
    "telechat_12b": 3.0e12,
}


def get_model(name: str) -> ModelConfig:
    """The config of a published model.

    >>> get_model("tele_flm_52b").embed_dim
    8192

    Raises:
      UserError: an unknown name; the message gives the nearest known one, or all.
    """
    require(isinstance(name, str), f"get_model: expected the name of a model, got {type(name).__name__}")
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PUBLISHED)}"
        raise UserError(f"unknown model {name!r}; {hint}")
    return ModelConfig(**PUBLISHED[name])

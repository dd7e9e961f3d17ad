"""The heads, which read the final hidden state: logits over the vocabulary, and a scalar where there is that head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tele_jax.axes import Params, declare
from tele_jax.config import ModelConfig, require


class Head(nn.Module):
    """A kernel from embed to `output`, which is no part of the forward pass: the functions below read it."""

    cfg: ModelConfig
    output: str

    @nn.compact
    def __call__(self) -> jax.Array:
        return declare(self, "kernel", inputs=("embed",), outputs=(self.output,))


def declare_heads(cfg: ModelConfig) -> None:
    """Declares the heads inside the module that is being initialised."""
    if not cfg.tie_embeddings:
        Head(cfg, "vocab", name="lm_head")()
    if cfg.scalar_head:
        Head(cfg, "score", name="scalar_head")()


def head_kernel(cfg: ModelConfig, params: Params) -> jax.Array:
    """The head's kernel [D, V], V = padded_vocab_size; the transposed table where the two are tied."""
    return params["embed"]["table"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]


def logits_of(cfg: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Logits [..., vocab_size] of a final hidden state [..., D]; float32 or better."""
    accumulate = jnp.promote_types(cfg.dtype, jnp.float32)
    kernel = head_kernel(cfg, params).astype(cfg.dtype)
    logits = jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=accumulate) * cfg.logit_mult
    return logits[..., : cfg.vocab_size]


def scalar_of(cfg: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Scalars [...] of a final hidden state [..., D], x @ kernel; float32 or better.

    Where the sequence ends, the score of a reward model; at a token of a reply, the value of the state before it.

    Raises UserError where cfg has no scalar_head.
    """
    require(cfg.scalar_head, "the model has no scalar head (scalar_head=False): it is no reward model")
    kernel = params["scalar_head"]["kernel"][:, 0]
    accumulate = jnp.promote_types(cfg.dtype, jnp.float32)
    return jnp.einsum("...D,D->...", x.astype(accumulate), kernel.astype(accumulate), precision="highest")

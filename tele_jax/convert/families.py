"""Tables that say which tensor of a release holds which leaves of ours: one per family, read in both directions.

A row is a tensor of theirs, with its dimensions in the named axes of ours (axes.py):

    _row("h.{}.self_attention.key_value.weight", "kv_heads * head_dim, embed", "layers.attn.k", "layers.attn.v")

A comma ends a dimension; the axes of one dimension lie row-major in it; {} stands for the layer. Where a tensor holds
several leaves, * is the place in which they take turns: above, each head has its key, then its value. Shapes, and the
axes of the leaves, come from model/spec.py.

What a format has no place for, multipliers and padding rows of the vocabulary, is folded into the weights first.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from tele_jax.axes import ParamSpec
from tele_jax.config import ModelConfig, Ntk, require
from tele_jax.errors import UserError, abridged
from tele_jax.extras import need
from tele_jax.model.spec import flat_spec

# The scalar head of a reward model or of PPO, under the name that transformers has for it in a classifier of sequences.
SCALAR_HEAD = "score.weight"
FORMATS = ("tele_flm", "telechat", "telechat_52b", "llama", "gguf")
# A GGUF file holds the tensors of a Llama release, under the names and in the order of rows of llama.cpp.
LLAMA_LIKE = ("llama", "gguf")


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of a release.

    dimensions: the axes of each. constant: what it is full of, where it holds no leaf. beside: a leaf without which it
    is not there either.
    """

    name: str
    dimensions: tuple[tuple[str, ...], ...]
    leaves: tuple[str, ...]
    constant: float | None = None
    beside: str | None = None


def _row(name: str, dimensions: str, *leaves: str, constant: float | None = None, beside: str | None = None) -> Row:
    parsed = tuple(tuple(part.split()) for part in dimensions.split(",")) if dimensions else ()
    return Row(name, parsed, leaves, constant, beside)


_LLAMA_NORMS_AND_MLP = (
    _row("model.layers.{}.input_layernorm.weight", "embed", "layers.attn_norm.scale"),
    _row("model.layers.{}.post_attention_layernorm.weight", "embed", "layers.mlp_norm.scale"),
    _row("model.layers.{}.mlp.gate_proj.weight", "mlp, embed", "layers.mlp.gate"),
    _row("model.layers.{}.mlp.up_proj.weight", "mlp, embed", "layers.mlp.up"),
    _row("model.layers.{}.mlp.down_proj.weight", "embed, mlp", "layers.mlp.down"),
)
TELE_FLM = (
    _row("model.embed_tokens.weight", "vocab, embed", "embed.table"),
    *_LLAMA_NORMS_AND_MLP,
    _row("model.layers.{}.self_attn.q_proj.weight", "heads head_dim, embed", "layers.attn.q"),
    _row("model.layers.{}.self_attn.k_proj.weight", "kv_heads head_dim, embed", "layers.attn.k"),
    _row("model.layers.{}.self_attn.v_proj.weight", "kv_heads head_dim, embed", "layers.attn.v"),
    _row("model.layers.{}.self_attn.o_proj.weight", "embed, heads head_dim", "layers.attn.o"),
    _row("model.norm.weight", "embed", "final_norm.scale"),
    _row("lm_head.weight", "vocab, embed", "lm_head.kernel"),
    _row(SCALAR_HEAD, "score, embed", "scalar_head.kernel"),
)
# Llama's attention_bias and mlp_bias put a bias on every projection; ours are on the last of each block only.
LLAMA = (
    *TELE_FLM,
    _row("model.layers.{}.self_attn.q_proj.bias", "heads head_dim", constant=0.0, beside="layers.attn.o_bias"),
    _row("model.layers.{}.self_attn.k_proj.bias", "kv_heads head_dim", constant=0.0, beside="layers.attn.o_bias"),
    _row("model.layers.{}.self_attn.v_proj.bias", "kv_heads head_dim", constant=0.0, beside="layers.attn.o_bias"),
    _row("model.layers.{}.self_attn.o_proj.bias", "embed", "layers.attn.o_bias"),
    _row("model.layers.{}.mlp.gate_proj.bias", "mlp", constant=0.0, beside="layers.mlp.down_bias"),
    _row("model.layers.{}.mlp.up_proj.bias", "mlp", constant=0.0, beside="layers.mlp.down_bias"),
    _row("model.layers.{}.mlp.down_proj.bias", "embed", "layers.mlp.down_bias"),
)
TELECHAT = (
    _row("word_embeddings.weight", "vocab, embed", "embed.table"),
    _row("h.{}.input_layernorm.weight", "embed", "layers.attn_norm.scale"),
    _row("h.{}.post_attention_layernorm.weight", "embed", "layers.mlp_norm.scale"),
    _row("h.{}.self_attention.query.weight", "heads head_dim, embed", "layers.attn.q"),
    _row("h.{}.self_attention.key_value.weight", "kv_heads * head_dim, embed", "layers.attn.k", "layers.attn.v"),
    _row("h.{}.self_attention.dense.weight", "embed, heads head_dim", "layers.attn.o"),
    _row("h.{}.self_attention.dense.bias", "embed", "layers.attn.o_bias"),
    _row("h.{}.mlp.gate_proj.weight", "mlp, embed", "layers.mlp.gate"),
    _row("h.{}.mlp.up_proj.weight", "mlp, embed", "layers.mlp.up"),
    _row("h.{}.mlp.down_proj.weight", "embed, mlp", "layers.mlp.down"),
    _row("h.{}.mlp.down_proj.bias", "embed", "layers.mlp.down_bias"),
    _row("ln_f.weight", "embed", "final_norm.scale"),
    _row("lm_head.weight", "vocab, embed", "lm_head.kernel"),
    _row(SCALAR_HEAD, "score, embed", "scalar_head.kernel"),
)
TELECHAT_52B = (
    _row("transformer.wte.weight", "vocab, embed", "embed.table"),
    _row("transformer.h.{}.ln_1.weight", "embed", "layers.attn_norm.scale"),
    _row("transformer.h.{}.ln_2.weight", "embed", "layers.mlp_norm.scale"),
    _row(
        "transformer.h.{}.attn.c_attn.weight",
        "embed, * heads head_dim",
        "layers.attn.q",
        "layers.attn.k",
        "layers.attn.v",
    ),
    _row("transformer.h.{}.attn.c_proj.weight", "heads head_dim, embed", "layers.attn.o"),
    # GPT-2's code registers this buffer with -10,000; nothing reads it.
    _row("transformer.h.{}.attn.masked_bias", "", constant=-1e4),
    _row("transformer.h.{}.mlp.c_fc.weight", "embed, * mlp", "layers.mlp.gate", "layers.mlp.up"),
    _row("transformer.h.{}.mlp.c_proj.weight", "mlp, embed", "layers.mlp.down"),
    _row("transformer.ln_f.weight", "embed", "final_norm.scale"),
    _row("lm_head.weight", "vocab, embed", "lm_head.kernel"),
    _row(SCALAR_HEAD, "score, embed", "scalar_head.kernel"),
)
TABLES = {"tele_flm": TELE_FLM, "telechat": TELECHAT, "telechat_52b": TELECHAT_52B, **dict.fromkeys(LLAMA_LIKE, LLAMA)}
# Buffers that some copies have and that say nothing: rotary frequencies and tables, computed from the config; the
# causal mask; positions 0, 1, 2, ... By the end of the name, the dtypes that such a buffer has.
_FLOATS, _INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64", "I32")
BUFFERS = {
    "inv_freq": _FLOATS,
    "rotary_emb.cos_cached": _FLOATS,
    "rotary_emb.sin_cached": _FLOATS,
    "attn.bias": ("BOOL", "U8"),
    "position_ids": _INTEGERS,
}


def is_buffer(name: str, dtype: str) -> bool:
    """Tells whether a tensor of a release carries nothing; dtype: its name in the file."""
    return any(
        (name == ending or name.endswith("." + ending)) and dtype in dtypes for ending, dtypes in BUFFERS.items()
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf, or one layer of it, as it lies in a tensor.

    axes: the axes of the tensor, one name per axis, with * where its parts take turns. sizes: of these. turn: the place
    of this part along *. layer: None where the leaf is not stacked. pairs: whether the numbers of head_dim that rotate
    together are neighbours in the tensor (GGUF), where the leaf has them half a head apart.
    """

    leaf: str
    layer: int | None
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    turn: int
    pairs: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a release, without its values. parts: what it holds; else it is full of `constant`."""

    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    parts: tuple[Part, ...]
    constant: float | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


# How the formats differ: which code reads them decides what they can express.
WITH_MULTIPLIERS = ("tele_flm", "telechat_52b")
WITH_OUTPUT_BIASES = ("telechat", *LLAMA_LIKE)
_OTHER = "; llama can hold it"


@dataclasses.dataclass(frozen=True)
class Folded:
    """cfg: the model as the file has it. factors: of the leaves that are not copied as they are."""

    cfg: ModelConfig
    factors: dict[str, float]

    @property
    def is_exact(self) -> bool:
        """True where every factor is a power of two, which changes no digit of a binary number."""
        return all(math.frexp(factor)[0] == 0.5 for factor in self.factors.values())


def fold(cfg: ModelConfig, format: str) -> Folded:
    """The model without what the format has no place for. The same function, written otherwise:

    multipliers   the embedding table takes input_mult, the final norm's scale the multiplier of the logits; divided by
                  input_mult where the embedding is tied, because there the table multiplies the logits as well. The
                  scalar head, which has no multiplier, takes the inverse of the last norm's
    padding       rows of the vocabulary from vocab_size on are left out (llama, gguf; the others have them as released)

    Raises:
      UserError: something else that the format cannot express; says what, and what to do.
    """
    require_expressible(cfg, format)
    factors = {}
    if format not in WITH_MULTIPLIERS:
        factors = {
            "embed.table": cfg.input_mult,
            "final_norm.scale": (norm := cfg.logit_mult / (cfg.input_mult if cfg.tie_embeddings else 1.0)),
        } | ({"scalar_head.kernel": 1 / norm} if cfg.scalar_head else {})
        cfg = cfg.replace(input_mult=1.0, output_mult=1.0, mup_base_width=None)
    if format in LLAMA_LIKE:
        cfg = cfg.replace(padded_vocab_size=cfg.vocab_size)
    return Folded(cfg, {leaf: factor for leaf, factor in factors.items() if factor != 1.0})


def require_expressible(cfg: ModelConfig, format: str) -> None:
    """Raises UserError for a model that the code which reads the format cannot run."""
    where = f"format {format}"
    require(
        cfg.residual_mult == 1,
        f"{where}: has no factor on the residual branches, as this model does (residual_mult={cfg.residual_mult:g})",
    )
    require(not cfg.embed_norm, f"{where}: has no norm after the embedding, as this model does (embed_norm)")
    require(
        cfg.rope.tables == "float32" or format == "telechat",
        f"{where}: rotary tables rounded to float16 (rope.tables) are TeleChat's alone; import with --rope-tables "
        "float32 for a model that any code runs",
    )
    width = cfg.num_heads * cfg.head_dim
    require(
        width == cfg.embed_dim or format in LLAMA_LIKE,
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
    ntk = cfg.rope.ntk
    if ntk is not None and not _is_constant(cfg):
        raise UserError(
            f"{where}: cannot express TeleChat's NTK scaling, which changes the rotary base from "
            f"{ntk.trained_length:,} tokens on, while this model's max_seq_len is {cfg.max_seq_len:,}; "
            f"with --max-seq-len {ntk.trained_length} it can be exported for texts up to that length"
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


def tensors(cfg: ModelConfig, format: str, dtype: DTypeLike | None = None) -> list[Tensor]:
    """The tensors that an export of a model writes, in the order of the file; allocates nothing.

    dtype: of the file; cfg.param_dtype by default.

    >>> from tele_jax.published import get_model
    >>> len(tensors(get_model("telechat_7b"), "telechat", "bfloat16"))
    302

    Raises:
      UserError: the format cannot express the model; says what, and which format can.
    """
    return expected(fold(cfg, format).cfg, format, dtype)


def expected(cfg: ModelConfig, format: str, dtype: DTypeLike | None = None, prefix: str | None = None) -> list[Tensor]:
    """The tensors of a model that is as the format has it: its multipliers and vocabulary are those of the file.

    prefix: of telechat's names; by default as released, none where the embedding is tied and `transformer.` elsewhere.
    """
    spec = flat_spec(cfg)
    dtype = jnp.dtype(cfg.param_dtype if dtype is None else dtype)
    if prefix is None:
        prefix = "transformer." if format == "telechat" and not cfg.tie_embeddings else ""
    rows = [row for row in TABLES[format] if _is_there(row, spec)]
    held = {leaf for row in rows for leaf in row.leaves}
    if missing := spec.keys() - held:
        raise UserError(f"format {format}: has no tensor for {abridged(sorted(missing))}; choose another format")
    layered = [row for row in rows if "{}" in row.name]
    first, rest = rows[: rows.index(layered[0])], [row for row in rows[rows.index(layered[0]) :] if row not in layered]
    order = [(row, None) for row in first]
    order += [(row, layer) for layer in range(cfg.num_layers) for row in layered]
    order += [(row, None) for row in rest]
    tensors = [_tensor(row, layer, spec, cfg.axis_sizes, dtype, prefix) for row, layer in order]
    return _as_gguf(tensors, cfg.num_layers) if format == "gguf" else tensors


def _as_gguf(tensors: list[Tensor], num_layers: int) -> list[Tensor]:
    """Tensors of a Llama release as llama.cpp has them: other names, vectors in float32, rows of q and k in pairs.

    The names come from the table of the package `gguf`. For the pairs see `permute` in llama.cpp's conversion of Llama.
    """
    gguf = need("gguf", how="pip install tele_jax[gguf]")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    renamed = []
    for tensor in tensors:
        name = names.get_name(tensor.name, (".weight", ".bias"))
        if name is None:
            raise UserError(f"format gguf: has no place for {tensor.name}; --format llama has one")
        parts = tuple(
            dataclasses.replace(part, pairs=part.leaf in ("layers.attn.q", "layers.attn.k")) for part in tensor.parts
        )
        dtype = jnp.dtype("float32") if len(tensor.shape) == 1 else tensor.dtype
        renamed.append(dataclasses.replace(tensor, name=name, parts=parts, dtype=dtype))
    return renamed


def _is_there(row: Row, spec: dict[str, ParamSpec]) -> bool:
    return all(leaf in spec for leaf in row.leaves) and (row.beside is None or row.beside in spec)


def _tensor(row: Row, layer: int | None, spec, sizes: dict[str, int], dtype, prefix: str) -> Tensor:
    sizes = sizes | {"*": len(row.leaves)}
    axes = tuple(axis for dimension in row.dimensions for axis in dimension)
    shape = tuple(math.prod(sizes[axis] for axis in dimension) for dimension in row.dimensions)
    parts = tuple(
        Part(
            leaf, layer if spec[leaf].stack else None, _own_axes(axes, spec[leaf]), tuple(sizes[a] for a in axes), turn
        )
        for turn, leaf in enumerate(row.leaves)
    )
    name = row.name.format(layer)
    is_head = name.startswith("lm_head") or name == SCALAR_HEAD
    return Tensor(name if is_head else prefix + name, shape, dtype, parts, row.constant)


def _own_axes(axes: tuple[str, ...], leaf: ParamSpec) -> tuple[str, ...]:
    """The axes by the names that the leaf has for them: fused with the queries, keys lie over `heads`."""
    return tuple("kv_heads" if axis == "heads" and "kv_heads" in leaf.axes else axis for axis in axes)

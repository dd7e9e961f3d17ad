"""Frozen configuration of a model, and the one way from a ConfigDict to a frozen dataclass.

What can be wrong with a value by itself is said here, or in settings.py, when it enters; all other code trusts it.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from tele_jax.errors import DamageError, UserError
from tele_jax.errors import check_seed as check_seed
from tele_jax.errors import given as given
from tele_jax.errors import nearest as nearest
from tele_jax.errors import require as require
from tele_jax.errors import require_known as require_known
from tele_jax.errors import whole as whole

T = TypeVar("T")


class Filled(typing.Generic[T]):
    """Type of a dataclass field whose default is FILLED, None, and which __post_init__ fills in: it reads as T."""

    if typing.TYPE_CHECKING:

        def __get__(self, config: object, owner: type | None = None) -> T: ...
        def __set__(self, config: object, value: T | None) -> None: ...

    else:

        def __class_getitem__(cls, hint):
            return hint | None


FILLED: Any = None

# Fields of ModelConfig that say how a model is computed, not which model it is: a checkpoint may be read with others.
EXECUTION_FIELDS = frozenset({"dtype", "remat", "attention"})


def from_dict(cls: type[T], values: Mapping[str, object], where: str = "config") -> T:
    """Makes the frozen dataclass `cls` from a mapping (dict or ConfigDict), nested dataclasses included.

    >>> from_dict(Rope, {"theta": 5e5}, "config.model.rope")
    Rope(theta=500000.0, ntk=None, tables='float32')

    Raises:
      UserError: an unknown key (with the nearest known one), a missing key, or a value of another type; the message
        starts with the full path of the key.
    """
    kwargs = _converted(cls, values, where)
    try:
        return cls(**kwargs)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _named(cls: Any, values: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Returns values by field name of a dataclass; errors as `from_dict`, but for those of types."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise UserError(f"{where}: expected {cls.__name__} or a table of its fields, got {values!r}")
    for key in values.keys() - fields.keys():
        raise UserError(f"{where}.{key}: unknown key of {cls.__name__}; {nearest(key, fields, 'known keys')}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}.{name}: missing, and {cls.__name__} has no default for it")
    return values


def _converted(cls: Any, values: Mapping[str, object], where: str) -> Mapping[str, Any]:
    """Converts values by field name to the types of the fields of a dataclass; errors as `from_dict`."""
    return {
        key: convert(_hints(cls)[key], value, f"{where}.{key}") for key, value in _named(cls, values, where).items()
    }


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_fields(cls: type[T], check: Callable[..., Mapping[str, Any]] = _converted) -> type[T]:
    """Makes the constructor of a dataclass check names and types of its fields as `from_dict` does.

    >>> Rope(tetha=5e5)
    Traceback (most recent call last):
    tele_jax.errors.UserError: Rope.tetha: unknown key of Rope; did you mean 'theta'?
    """
    made: Any = cls
    construct, order = made.__init__, [field.name for field in dataclasses.fields(made) if not field.kw_only]

    @functools.wraps(construct)
    def init(self: object, *args: object, **values: object) -> None:
        twice = values.keys() & order[: len(args)]
        require(len(args) <= len(order) and not twice, f"{cls.__name__}: give every field once, by its name")
        construct(self, **check(cls, dict(zip(order, args, strict=False)) | values, cls.__name__))

    made.__init__ = init
    return cls


def check_names(cls: type[T]) -> type[T]:
    """Makes the constructor of a dataclass check the names of its fields alone: it checks their values itself."""
    return check_fields(cls, _named)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def checked(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass of keywords, with `check_fields`."""
    return check_fields(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def as_written(hint: object, value: object, where: str) -> Any:
    """Converts a value from JSON that tele_jax wrote to the type `hint`; see `convert`.

    >>> as_written(tuple[str, ...], ["small", "grow"], "W/config.json: run")
    ('small', 'grow')

    Raises:
      DamageError: a field is missing, unknown or of another type; the message has its path.
    """
    try:
        return convert(hint, value, where)
    except UserError as error:
        raise DamageError(f"{error}: damaged") from None


def written_table(
    value: object, where: str, fields: Mapping[str, object], required: Collection[str] = ()
) -> dict[str, Any]:
    """Returns a value from JSON if it is a table in which `fields`, {name: type}, are of their types.

    Other fields pass. Raises DamageError, also where one of the `required` is missing.
    """
    if not isinstance(value, dict):
        raise DamageError(f"{where}: damaged, not a table, but {type(value).__name__}")
    if missing := [name for name in required if name not in value]:
        raise DamageError(f"{where}: damaged, {missing[0]} is missing")
    for name in fields.keys() & value.keys():
        as_written(fields[name], value[name], f"{where}: {name}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Turns a config into nested plain dicts and lists, ready for JSON; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def differing_fields(have: "ModelConfig", want: "ModelConfig") -> dict[str, tuple[object, object]]:
    """{field: (value, wanted value)} where two configs are different models; EXECUTION_FIELDS are free."""
    ours, theirs = to_dict(have), to_dict(want)
    return {n: (ours[n], theirs[n]) for n in ours if ours[n] != theirs[n] and n not in EXECUTION_FIELDS}


def convert(hint: Any, value: Any, where: str) -> Any:
    """Converts a value to the type `hint`; raises UserError with its path where it is of another."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value.to_dict() if hasattr(value, "to_dict") else value  # a table of a page, which JSON does not know
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [a for a in args if a is not type(None)]
        for choice in choices[:-1]:
            try:
                return convert(choice, value, where)
            except UserError:
                continue
        return convert(choices[-1], value, where)
    if origin is typing.Literal:
        if not any(type(value) is type(known) and value == known for known in args):  # numpy's dtypes equal names
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or hasattr(value, "items") or not hasattr(value, "__iter__"):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not hasattr(value, "items"):
            raise UserError(f"{where}: expected a table, got {value!r}")
        for key in value:
            require(isinstance(key, str), f"{where}: expected names as keys, got {key!r}")
        return {key: convert(args[1], v, f"{where}.{key}") for key, v in value.items()}
    # A class with a JSON form of its own, such as a plan, is not read from a table of its fields.
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not hasattr(hint, "from_json"):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if hint is float:
        try:
            return float(value) if _is_number(value) else finite(value, where)
        except OverflowError:
            raise UserError(f"{where}: a number of {len(str(abs(value)))} digits is too large") from None
    if hint is int:
        return whole(value, where)
    if isinstance(value, origin or hint):
        return value
    raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")


def finite(value: Any, what: str) -> float:
    """Returns the value as a float. Raises UserError unless it is a number, and finite; text, True and NaN are not."""
    require(_is_number(value) and math.isfinite(value), f"{what}={value!r} must be a finite number")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, (bool, np.bool_))


def require_config(cfg: object, where: str) -> None:
    """Raises UserError, naming the argument, for what is not a ModelConfig."""
    hint = "; tele.get_model(name) makes one" if isinstance(cfg, str) else ""
    require(isinstance(cfg, ModelConfig), f"{where}: expected a ModelConfig, got {type(cfg).__name__}{hint}")


def require_positive(config: object, *names: str) -> None:
    """Raises UserError for the first named field that is not above zero, or infinite."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be above 0")
        require(value < math.inf, f"{name}={value} must be finite")


@check_fields
@dataclasses.dataclass(frozen=True)
class Ntk:
    """Dynamic NTK scaling of the rotary base, as the released code of TeleChat-7B has it.

    For a sequence of total length `length`: n = max(length, trained_length),
    alpha = max(2^ceil(log2(n / original_length) + 1) - 1, 1), base = theta * alpha^p with p = d / (d - 2) for
    `base="ntk"` and p = 1 for `base="linear"`; cos and sin are multiplied by
    1 + attention_slope * ln(n / trained_length).
    """

    original_length: int = 4096  # tokens for which theta stands as it is
    trained_length: int = 8192  # tokens of the longest sequence in training
    base: typing.Literal["ntk", "linear"] = "ntk"  # which power of alpha multiplies theta
    attention_slope: float = 0.1  # growth of the factor on cos and sin with the length

    def __post_init__(self):
        require_positive(self, "original_length", "trained_length")
        require(0 <= self.attention_slope < math.inf, f"attention_slope={self.attention_slope} must not be negative")


@check_fields
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split pairs: theta is the base; ntk makes it depend on the length.

    tables: "float16" rounds cos and sin as TeleChat's released code does, for its bits; no other code does that.
    """

    theta: float = 10_000.0  # base of the frequencies
    ntk: Ntk | None = None  # None: theta does not depend on the length
    tables: typing.Literal["float32", "float16"] = "float32"  # dtype that cos and sin are rounded to

    def __post_init__(self):
        require_positive(self, "theta")


@checked
class ModelConfig:
    """A decoder of the Tele-FLM or TeleChat family. Sizes are counts, multipliers are dimensionless.

    Raises:
      UserError: sizes that do not fit together, each naming the field to change.
    """

    num_layers: int  # decoder layers
    embed_dim: int  # width of the residual stream
    num_heads: int  # attention heads of queries
    mlp_dim: int  # hidden units of the gated MLP
    vocab_size: int  # token ids; the tokenizer may have fewer
    num_kv_heads: Filled[int] = FILLED  # heads of keys and values; None: num_heads
    head_dim: Filled[int] = FILLED  # channels of a head, even; None: embed_dim / num_heads, which must divide
    padded_vocab_size: Filled[int] = FILLED  # rows of the embedding; None: vocab_size
    max_seq_len: int = 4096  # positions that the model may see
    rms_eps: float = 1e-5  # added to the mean square in every RMSNorm
    rope: Rope = Rope()  # rotary position embedding
    input_mult: float = 1.0  # factor on the output of the embedding
    output_mult: float = 1.0  # factor on the logits; with mup_base_width also times base width / embed_dim
    residual_mult: float = 1.0  # factor on what attention and MLP add to the residual stream; see docs/mup.md
    mup_base_width: int | None = None  # width at which muP rates and initial values were found; None: no muP
    tie_embeddings: bool = False  # the head is the transposed embedding table
    scalar_head: bool = False  # a head with one output beside that of the vocabulary: a score, or a value
    output_biases: bool = False  # on the attention output and the mlp's down projection, nowhere else
    embed_norm: bool = False  # an RMSNorm after the embedding
    init_std: float = 0.02  # vector-like parameters, and matrix-like ones at the base width
    matrix_init_std: Filled[float] = FILLED  # matrix-like ones at the base width; None: init_std
    dtype: typing.Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of activations and matrix products
    param_dtype: typing.Literal["bfloat16", "float32", "float64"] = "float32"  # dtype that parameters are stored in
    # what the backward pass computes again, see model/decoder.py
    remat: typing.Literal["none", "full", "attention", "products", "offload"] = "full"
    # which implementation, see model/attention.py; auto: by device and length
    attention: typing.Literal["auto", "reference", "xla", "blocks", "splash"] = "auto"

    def __post_init__(self):
        derived = {"num_kv_heads": "num_heads", "padded_vocab_size": "vocab_size", "matrix_init_std": "init_std"}
        for name, origin in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, origin))
        for field in dataclasses.fields(self):
            if field.type is float or field.name == "matrix_init_std":
                finite(getattr(self, field.name), field.name)
        sizes = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "max_seq_len")
        factors = ("rms_eps", "input_mult", "output_mult", "residual_mult", "init_std", "matrix_init_std")
        require_positive(self, *sizes, *factors)
        for name in sizes:
            require(getattr(self, name) < 2**31, f"{name}={getattr(self, name)} must be below 2^31")
        if self.head_dim is None:
            require(
                self.embed_dim % self.num_heads == 0,
                f"embed_dim={self.embed_dim} does not divide into num_heads={self.num_heads}; "
                "give head_dim, or change one of the two",
            )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        require(
            0 < self.head_dim < 2**31 and self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even, above 0 and below 2^31",
        )
        scaled = self.rope.ntk is not None and self.rope.ntk.base == "ntk"
        require(not scaled or self.head_dim > 2, "head_dim=2 leaves nothing to scale by NTK; take at least 4")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} does not divide into num_kv_heads={self.num_kv_heads} equal groups",
        )
        require(
            self.vocab_size <= self.padded_vocab_size < 2**31,
            f"padded_vocab_size={self.padded_vocab_size} is below vocab_size={self.vocab_size}, or not below 2^31",
        )
        if self.mup_base_width is not None:
            require_positive(self, "mup_base_width")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every logical axis of the parameters, by name."""
        return {
            "layers": self.num_layers,
            "embed": self.embed_dim,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp_dim,
            "vocab": self.padded_vocab_size,
        } | ({"score": 1} if self.scalar_head else {})

    @property
    def width_ratio(self) -> float:
        """muP's r = width / base width; 1.0 without muP."""
        return 1.0 if self.mup_base_width is None else self.embed_dim / self.mup_base_width

    @property
    def logit_mult(self) -> float:
        """Factor on the logits: output_mult / r."""
        return self.output_mult / self.width_ratio

    def require_positions(self, seq_len: int) -> None:
        """Raises UserError for rows of more tokens than the model has positions; with NTK scaling it has any number."""
        require(
            self.rope.ntk is not None or seq_len <= self.max_seq_len,
            f"seq_len={seq_len} is above the model's max_seq_len={self.max_seq_len}",
        )

    def rope_length_factors(self, length: int) -> tuple[float, float]:
        """(rotary base, factor on cos and sin) for a sequence of `length` tokens in total."""
        ntk = self.rope.ntk
        if ntk is None:
            return self.rope.theta, 1.0
        n = max(length, ntk.trained_length)
        alpha = max(2.0 ** math.ceil(math.log2(n / ntk.original_length) + 1) - 1, 1.0)
        power = self.head_dim / (self.head_dim - 2) if ntk.base == "ntk" else 1.0
        return self.rope.theta * alpha**power, 1.0 + ntk.attention_slope * math.log(n / ntk.trained_length)

    def replace(self, **changes: object) -> "ModelConfig":
        """A copy with some fields changed, validated again.

        Multi-head attention stays so when num_heads changes, a vocabulary without padding when vocab_size does.

        Raises:
          UserError: a field that there is not, or values that do not fit together.
        """
        return dataclasses.replace(self, **{**self._follow(changes), **changes})

    def replace_from(self, changes: Mapping[str, object], where: str) -> "ModelConfig":
        """Replaces fields from a config table; unknown keys and wrong types raise UserError with their path."""
        return from_dict(ModelConfig, {**to_dict(self), **self._follow(changes), **dict(changes.items())}, where)

    def _follow(self, changes: Mapping[str, object]) -> dict[str, None]:
        """Names the fields that were derived from one that changes, and have to be derived again."""
        pairs = {"num_kv_heads": "num_heads", "padded_vocab_size": "vocab_size"}
        same = {derived: origin for derived, origin in pairs.items() if getattr(self, derived) == getattr(self, origin)}
        return {derived: None for derived, origin in same.items() if origin in changes}

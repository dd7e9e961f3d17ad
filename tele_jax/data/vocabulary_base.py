"""The interface of vocabularies: text to ids and back without loss, and the special ids of the released tokenizers."""

import abc
import copy
import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax import files
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import PathLike

Tensor = Any  # of TensorFlow, which is imported when it is used
MARKERS = ("<_user>", "<_bot>", "<_end>", "<_system>", "<_start>", "<_pad>")  # never to be matched in plain text
MISSING = "No such file or directory; train one with: tele tokenizer train"

# Special ids as in the released tokenizers.
SPECIAL_IDS: Mapping[str, Mapping[str, int]] = {
    "telechat_7b": {"<_user>": 160130, "<_bot>": 160131, "<_start>": 160132, "<_end>": 160133, "<pad>": 3},
    "telechat_12b": {"<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 20, "<_bot>": 21, "<_system>": 22},
    "telechat2": {"<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 4, "<_bot>": 5, "<_system>": 6},
}
# The released tokenizer_config.json names only some pieces of this file; the numbers of these two are published.
BY_NUMBER: Mapping[str, tuple[str, ...]] = {"telechat_7b": ("<_user>", "<_bot>")}


def _id_of(piece: str) -> functools.cached_property[int]:
    """Declares an attribute with the id of a marker; reading it raises UserError where the vocabulary has none."""
    return functools.cached_property(lambda vocabulary: vocabulary.id_of(piece))


class Vocabulary(abc.ABC):
    r"""A vocabulary that is lossless on valid UTF-8 and knows the special ids of this project by name.

    There is one exception: in a SentencePiece file with a dummy prefix, as the released ones are, U+2581 becomes a
    space.

        vocabulary.decode(vocabulary.encode("  def f():\n\treturn 1 \n")) == "  def f():\n\treturn 1 \n"

    The class has all members of a seqio vocabulary, and where seqio is loaded (tele_jax.data.tasks) it counts as one
    for isinstance. It does not inherit from seqio's class, because that would load TensorFlow for a line of chat; only
    `encode_tf` and `decode_tf` load it.

    Dialogue markers in plain text are never read as markers, whatever their type in the file: a user who types "<_bot>"
    into a chat cannot speak for the model.

    Attributes:
      path: path of the file.
      sha256: SHA-256 of the file, in hexadecimal.
      vocab_size: number of ids.
      unk_id, bos_id, eos_id, pad_id: int; -1 where there is none.
      user_id, bot_id, end_id, system_id: ids of the dialogue markers; UserError where there is none.
      spells_bytes: True where every byte has a piece, so that nothing is unknown.
      adds_dummy_prefix: True where `encode` puts a space before every text, which `decode` takes away again. The
        released SentencePiece files do; vocabularies trained here do not.
      template: name of the dialogue template to use (data/templates.py); None: the one that the ids imply.
    """

    extra_ids = 0
    template: str | None = None
    _space_byte_id = -1  # the piece of the byte 0x20, which no dummy prefix makes
    vocab_size: int
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    spells_bytes: bool
    adds_dummy_prefix: bool
    user_id, bot_id = _id_of("<_user>"), _id_of("<_bot>")
    end_id, system_id = _id_of("<_end>"), _id_of("<_system>")

    def __init__(self, path: PathLike):
        """Reads the file.

        Raises:
          UserError: there is no such file, it is not of its kind, or the library for it is not installed.
        """
        self.path = str(path)
        serialized = files.read_bytes(path, "tokenizer ", missing=MISSING)
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self._open(serialized)

    @abc.abstractmethod
    def _open(self, serialized: bytes) -> None:
        """Sets the attributes from the content of the file."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without BOS or EOS; UserError for no string or half a surrogate pair."""
        return self._checked(self._encode, text)

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the ids of `text` that follows other text: `encode` without the space of a dummy prefix."""
        return self._checked(self._encode_bare if self.adds_dummy_prefix else self._encode, text)

    def _checked(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"tokenizer {self.path}: {text!r} is not a text")
        try:
            return encode(text)
        except (TypeError, RuntimeError, ValueError):  # what the libraries raise for what is no UTF-8
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"tokenizer {self.path}: character {error.start} of the text is half a surrogate pair"
                ) from None
            raise

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Returns the ids of `text`."""

    @abc.abstractmethod
    def _encode_bare(self, text: str) -> list[int]:
        """Returns the ids of `text` without the space of the dummy prefix; called only where there is one."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Returns int32[n] for every text, the same ids as `encode`, on `threads` threads if the library has them."""
        del threads
        return [np.array(self.encode(text), np.int32) for text in texts]

    @abc.abstractmethod
    def find(self, piece: str) -> int | None:
        """Returns the id of a piece by its name in the file; None where there is none."""

    @abc.abstractmethod
    def piece(self, i: int) -> str:
        """Returns the name of the piece with this id."""

    @abc.abstractmethod
    def _spell(self, i: int) -> bytes:
        """Returns the bytes that an id stands for; none for control pieces."""

    def encode_tf(self, text: object) -> Tensor:
        """Turns tf.string [] into tf.int32 [n], the same ids as `encode`; calls Python."""
        tf = need("tensorflow")

        def encode(raw: bytes) -> np.ndarray:
            return np.array(self.encode(raw.decode()), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [text], tf.int32, stateful=False), [None])

    def decode_tf(self, ids: object) -> Tensor:
        """Turns tf.int32 [n] or [B, n] into tf.string [] or [B], up to the first EOS; calls Python."""
        tf = need("tensorflow")

        def decode(rows: np.ndarray) -> np.ndarray:
            texts = np.empty(rows.shape[:-1], object)
            for row in np.ndindex(texts.shape):
                texts[row] = self.decode(rows[row]).encode()
            return texts

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.ensure_shape(text, tf.convert_to_tensor(ids).shape[:-1])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` up to the first EOS, without the space of a dummy prefix.

        Control pieces and ids beyond the vocabulary have no text; bytes that are not UTF-8 become U+FFFD.
        chat.TextStream gives the same text token by token.

        Raises:
          UserError: an element is no whole number of at least 0.
        """
        parts: list[bytes] = []
        for i in self._until_end(ids):
            if spelled := self.piece_bytes[i] if i < self.vocab_size else b"":
                parts.append(spelled if parts else self.spelled(i, first=True))
        return b"".join(parts).decode("utf-8", errors="replace")

    def spelled(self, i: int, *, first: bool = False) -> bytes:
        """Returns the bytes of an id, none where it has no text; `first` drops the space of a dummy prefix."""
        spelled = self.piece_bytes[i] if i < self.vocab_size else b""
        is_prefixed = first and self.adds_dummy_prefix and i != self._space_byte_id and spelled[:1] == b" "
        return spelled[1:] if is_prefixed else spelled

    def _until_end(self, ids: Iterable[int]) -> list[int]:
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise UserError(f"tokenizer {self.path}: the ids are no whole numbers") from None
        if ids and min(ids) < 0:
            raise UserError(f"tokenizer {self.path}: {min(ids)} is no id")
        return ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids

    def id_of(self, piece: str) -> int:
        """Returns the id of a piece by its name, or by its published number where its name in the file is not known.

        Raises:
          UserError: the vocabulary has no such piece.
        """
        found = self.find(piece)
        if found is None and self.family is not None and piece in BY_NUMBER.get(self.family, ()):
            found = SPECIAL_IDS[self.family][piece]
        if found is None:
            raise UserError(f"tokenizer {self.path}: it has no piece {piece!r}")
        return found

    @functools.cached_property
    def family(self) -> str | None:
        """The released family whose special ids the vocabulary has: a key of SPECIAL_IDS, or None."""
        for family, ids in SPECIAL_IDS.items():
            found = {piece: self.find(piece) for piece in ids}
            missing = {piece for piece, i in found.items() if i is None}
            fits = all(i in (None, ids[piece]) for piece, i in found.items())
            if fits and missing <= set(BY_NUMBER.get(family, ())) and self.vocab_size > max(ids.values()):
                return family
        return None

    @functools.cached_property
    def piece_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that every id stands for, by id; empty for control pieces."""
        return tuple(map(self._spell, range(self.vocab_size)))

    def with_template(self, template: str | None) -> "Vocabulary":
        """Returns a copy that uses this dialogue template."""
        other = copy.copy(self)
        other.template = template
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

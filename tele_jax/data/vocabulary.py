"""Vocabularies: text to ids and back without loss, and the ids that mean something to us.

A file is a SentencePiece model (vocabulary_sentencepiece.py) or a JSON file of the `tokenizers` library
(vocabulary_tokenizers.py); both give the same interface.
"""

import abc
import copy
import functools
import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tele_jax import files
from tele_jax.errors import UserError

MARKERS = ("<_user>", "<_bot>", "<_end>", "<_system>", "<_start>", "<_pad>")  # never to be matched in plain text
# What a tokenizer is called beside or above the checkpoints that it belongs to, by kind of file.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

# Special ids as in the released tokenizers.
SPECIAL_IDS: Mapping[str, Mapping[str, int]] = {
    "telechat_7b": {"<_user>": 160130, "<_bot>": 160131, "<_start>": 160132, "<_end>": 160133, "<pad>": 3},
    "telechat_12b": {"<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 20, "<_bot>": 21, "<_system>": 22},
    "telechat2": {"<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 4, "<_bot>": 5, "<_system>": 6},
}
# The names in the released file are known of its ends alone (tokenizer_config.json); these have a number for sure.
BY_NUMBER: Mapping[str, tuple[str, ...]] = {"telechat_7b": ("<_user>", "<_bot>")}


class Vocabulary(abc.ABC):
    r"""A vocabulary: lossless on valid UTF-8, with the special ids of this project by name.

    One exception: U+2581 becomes a space in a SentencePiece file with a dummy prefix, as the released ones are.

    >>> vocabulary.decode(vocabulary.encode("  def f():\n\treturn 1 \n"))
    '  def f():\n\treturn 1 \n'

    It has all that a seqio vocabulary has, and where seqio is loaded (tele_jax.data.tasks) it counts as one for
    isinstance. It does not inherit from it, because that would load TensorFlow to answer a line of chat; only
    `encode_tf` and `decode_tf` do.

    Dialogue markers in plain text are never read as markers, whatever their type in the file: who types "<_bot>" into
    a chat cannot speak for the model.

    Attributes:
      path: of the file.
      sha256: of the file, in hexadecimal.
      vocab_size: number of ids.
      unk_id, bos_id, eos_id, pad_id: int; -1 where there is none.
      spells_bytes: whether it has a piece for every byte, so that nothing is unknown.
      adds_dummy_prefix: whether `encode` puts a space before every text, which `decode` takes away again. Vocabularies
        that are trained here do not; the released SentencePiece files do.
      template: name of the dialogue template to use with it (data/templates.py); None: the one it was made for.
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

    def __init__(self, path: str | os.PathLike):
        """Reads the file.

        Raises:
          UserError: there is no such file, it is not of its kind, or the library for it is not installed.
        """
        self.path = str(path)
        serialized = _bytes_of(path)
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self._open(serialized)

    @abc.abstractmethod
    def _open(self, serialized: bytes) -> None:
        """Sets the attributes."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS; UserError where it is no text or holds half a surrogate pair."""
        return self._checked(self._encode, text)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of `text` where it goes on after other text: `encode` without the space of a dummy prefix."""
        return self._checked(self._encode_bare if self.adds_dummy_prefix else self._encode, text)

    def _checked(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"tokenizer {self.path}: {text!r} is not a text")
        try:
            return encode(text)
        except Exception:  # the libraries raise TypeError and RuntimeError for what is no UTF-8
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"tokenizer {self.path}: character {error.start} of the text is half a surrogate pair"
                ) from None
            raise

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of `text`."""

    @abc.abstractmethod
    def _encode_bare(self, text: str) -> list[int]:
        """The ids of `text` without the space of the dummy prefix; asked for only where there is one."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """int32[n] for every text, the same ids as `encode`; on so many threads where the library has them."""
        del threads
        return [np.array(self.encode(text), np.int32) for text in texts]

    @abc.abstractmethod
    def find(self, piece: str) -> int | None:
        """The id of a piece by its name in the file; None where it has none."""

    @abc.abstractmethod
    def piece(self, i: int) -> str:
        """The name of the piece with this id."""

    @abc.abstractmethod
    def _spell(self, i: int) -> bytes:
        """The bytes that an id stands for; none for control pieces."""

    @abc.abstractmethod
    def encode_tf(self, text: Any) -> Any:
        """tf.string [] -> tf.int32 [n], the same ids as `encode`."""

    @abc.abstractmethod
    def decode_tf(self, ids: Any) -> Any:
        """tf.int32 [n] or [B, n] -> tf.string [] or [B], up to the first EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first EOS, without the space of a dummy prefix.

        Control pieces and ids beyond the vocabulary have no text; bytes that are not UTF-8 become U+FFFD.
        chat.TextStream gives the same text token by token.

        Raises:
          UserError: something is no id.
        """
        parts: list[bytes] = []
        for i in self._until_end(ids):
            if spelled := self.piece_bytes[i] if i < self.vocab_size else b"":
                parts.append(spelled if parts else self.spelled(i, first=True))
        return b"".join(parts).decode("utf-8", errors="replace")

    def spelled(self, i: int, *, first: bool = False) -> bytes:
        """The bytes of an id, none where it has no text; of the first of a text without the space of a dummy prefix."""
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
        """The id of a piece by its name, or by its published number where the name in the file is not known.

        Raises:
          UserError: the vocabulary has no such piece.
        """
        found = self.find(piece)
        if found is None and piece in BY_NUMBER.get(self.family, ()):
            found = SPECIAL_IDS[self.family][piece]
        if found is None:
            raise UserError(f"tokenizer {self.path}: it has no piece {piece!r}")
        return found

    @functools.cached_property
    def family(self) -> str | None:
        """Whose special ids it has: a key of SPECIAL_IDS, or None."""
        for family, ids in SPECIAL_IDS.items():
            found = {piece: self.find(piece) for piece in ids}
            missing = {piece for piece, i in found.items() if i is None}
            fits = all(i in (None, ids[piece]) for piece, i in found.items())
            if fits and missing <= set(BY_NUMBER.get(family, ())) and self.vocab_size > max(ids.values()):
                return family
        return None

    @functools.cached_property
    def user_id(self) -> int:
        """The id of `<_user>`. UserError where the vocabulary has no such piece, as for the other markers."""
        return self.id_of("<_user>")

    @functools.cached_property
    def bot_id(self) -> int:
        """The id of `<_bot>`."""
        return self.id_of("<_bot>")

    @functools.cached_property
    def end_id(self) -> int:
        """The id of `<_end>`."""
        return self.id_of("<_end>")

    @functools.cached_property
    def system_id(self) -> int:
        """The id of `<_system>`."""
        return self.id_of("<_system>")

    @functools.cached_property
    def piece_bytes(self) -> tuple[bytes, ...]:
        """For every id the UTF-8 bytes that it stands for: what streaming and counting bytes need. Control: empty."""
        return tuple(map(self._spell, range(self.vocab_size)))

    def with_template(self, template: str | None) -> "Vocabulary":
        """The same vocabulary, to be used with this dialogue template."""
        other = copy.copy(self)
        other.template = template
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


_MISSING = "No such file or directory; train one with: tele tokenizer train"


def _bytes_of(path: str | os.PathLike) -> bytes:
    return files.read_bytes(path, "tokenizer ", missing=_MISSING)


@functools.lru_cache(maxsize=8)
def _read(path: str, size: int, modified: int) -> Vocabulary:
    del size, modified  # so that a changed file is read again
    if is_tokenizers_json(path):
        from tele_jax.data.vocabulary_tokenizers import TokenizersVocabulary

        return TokenizersVocabulary(path)
    from tele_jax.data.vocabulary_sentencepiece import SentencePieceVocabulary

    return SentencePieceVocabulary(path)


def is_tokenizers_json(path: str | os.PathLike) -> bool:
    """Whether the file is JSON, told by its first byte; a SentencePiece model begins with another one."""
    return _bytes_of(path)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary in a SentencePiece model or `tokenizers` JSON file, read once as long as the file does not change.

    Raises:
      UserError: there is no such file, it is of neither kind, or the library for it is not installed.
    """
    files.require_regular(path, "tokenizer ", missing=_MISSING)
    status = os.stat(path)
    return _read(str(path), status.st_size, status.st_mtime_ns)


def tokenizer_name(path: str | os.PathLike) -> str:
    """What a tokenizer file is called where it travels with checkpoints: one of TOKENIZER_FILES."""
    return TOKENIZER_FILES[is_tokenizers_json(path)]


def tokenizer_in(directory: Path) -> Path | None:
    """The tokenizer file that a cache or a work directory carries; None where there is none."""
    return next((file for name in TOKENIZER_FILES if (file := directory / name).is_file()), None)

"""Reading a SentencePiece vocabulary: text to ids and back, exactly, and the ids that mean something to us."""

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tele_jax.data.extras import need
from tele_jax.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
MARKERS = ("<_user>", "<_bot>", "<_end>", "<_system>", "<_start>", "<_pad>")  # never to be matched in plain text


class Vocabulary:
    r"""A SentencePiece model: lossless on valid UTF-8, with the special ids of this project by name.

    >>> vocabulary.decode(vocabulary.encode("  def f():\n\treturn 1 \n"))
    '  def f():\n\treturn 1 \n'

    It has all that seqio.SentencePieceVocabulary has, and where seqio is loaded (tele_jax.data.tasks) it counts as one
    for isinstance. It does not inherit from it, because that would load TensorFlow to answer a line of chat; only
    `encode_tf` and `decode_tf` do.

    Two things differ from the bare SentencePiece model. The character U+2581, which SentencePiece cannot tell from a
    space, is spelled in bytes. And dialogue markers in plain text are never read as markers, whatever their type in
    the file: who types "<_bot>" into a chat cannot speak for the model.

    Attributes:
      path: of the model file.
      sha256: of the model file, in hexadecimal.
      sp_model: the serialized model as it is used here.
      tokenizer: the sentencepiece.SentencePieceProcessor.
      vocab_size: number of ids.
      unk_id, bos_id, eos_id, pad_id: int; -1 where the model has none.
      spells_bytes: whether it has a piece for every byte, so that nothing is unknown.
      adds_dummy_prefix: whether it puts a space before every text. Ours do not.
    """

    extra_ids = 0

    def __init__(self, path: str | os.PathLike):
        """Reads the file.

        Raises:
          UserError: there is no such file, it is not a SentencePiece model, or sentencepiece is not installed.
        """
        sentencepiece = need("sentencepiece")
        model_pb2 = need("sentencepiece.sentencepiece_model_pb2")
        self.path = str(path)
        try:
            serialized = Path(path).read_bytes()
        except OSError as error:
            hint = "; train one with: tele tokenizer train" if isinstance(error, FileNotFoundError) else ""
            raise UserError(f"tokenizer {self.path}: {error.strerror}{hint}") from None
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        try:
            model = model_pb2.ModelProto.FromString(serialized)
            types = model_pb2.ModelProto.SentencePiece
            for piece in model.pieces:
                if piece.piece in MARKERS and piece.type == types.USER_DEFINED:
                    piece.type = types.CONTROL
            self.sp_model = model.SerializeToString()
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=self.sp_model)
            self.vocab_size = self.tokenizer.get_piece_size()
        except Exception:  # protobuf and sentencepiece raise several unrelated types
            raise UserError(f"tokenizer {self.path}: not a SentencePiece model") from None
        self.unk_id = self.tokenizer.unk_id()
        self.bos_id = self.tokenizer.bos_id()
        self.eos_id = self.tokenizer.eos_id()
        self.pad_id = self.tokenizer.pad_id()
        self._space_ids = [self.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.spells_bytes = self.unk_id not in self._space_ids
        self.adds_dummy_prefix = model.normalizer_spec.add_dummy_prefix
        # With a dummy prefix, parts encoded apart would each get one; such a model stays as lossy as it was released.
        self._spells_space = self.spells_bytes and not self.adds_dummy_prefix

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS."""
        if SPACE not in text or not self._spells_space:
            return self.tokenizer.encode(text)
        ids = []
        for i, part in enumerate(text.split(SPACE)):
            ids += (self._space_ids if i else []) + self.tokenizer.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first EOS; control pieces vanish, bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode([i if i < self.vocab_size else self.unk_id for i in ids])

    def id_of(self, piece: str) -> int:
        """The id of a piece by its name.

        Raises:
          UserError: the vocabulary has no such piece.
        """
        found = self.tokenizer.piece_to_id(piece)
        if self.tokenizer.id_to_piece(found) != piece:
            raise UserError(f"tokenizer {self.path}: it has no piece {piece!r}")
        return found

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
        processor = self.tokenizer

        def spell(i: int) -> bytes:
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                return b""
            piece = processor.id_to_piece(i)
            return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(SPACE, " ").encode()

        return tuple(spell(i) for i in range(self.vocab_size))

    @functools.cached_property
    def tf_tokenizer(self) -> Any:
        """The tensorflow_text.SentencepieceTokenizer of the same model."""
        need("tensorflow")
        return need("tensorflow_text").SentencepieceTokenizer(model=self.sp_model)

    def encode_tf(self, text: Any) -> Any:
        """tf.string [] -> tf.int32 [n], the same ids as `encode`."""
        tf = need("tensorflow")
        if not self._spells_space:
            return self.tf_tokenizer.tokenize(text)
        parts = self.tf_tokenizer.tokenize(tf.strings.split(text, SPACE))
        space = tf.tile(tf.constant([self._space_ids], tf.int32), [parts.nrows(), 1])
        return tf.concat([parts, space], axis=1).flat_values[: -len(self._space_ids)]

    def decode_tf(self, ids: Any) -> Any:
        """tf.int32 [n] or [B, n] -> tf.string [] or [B], up to the first EOS."""
        tf = need("tensorflow")
        ended = tf.cumsum(tf.cast(ids == self.eos_id, tf.int32), axis=-1) > 0
        return self.tf_tokenizer.detokenize(tf.where(ended, self.eos_id, tf.where(ids < self.vocab_size, ids, 0)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Vocabulary({self.path!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


@functools.lru_cache(maxsize=8)
def _read(path: str, size: int, modified: int) -> Vocabulary:
    return Vocabulary(path)


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary in the SentencePiece model file `path`, read once as long as the file does not change.

    Raises:
      UserError: there is no such file, it is not a SentencePiece model, or sentencepiece is not installed.
    """
    try:
        status = os.stat(path)
    except OSError:
        return Vocabulary(path)  # says what is wrong
    return _read(str(path), status.st_size, status.st_mtime_ns)

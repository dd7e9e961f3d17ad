"""Reading a SentencePiece vocabulary."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tele_jax.data.extras import need
from tele_jax.data.vocabulary import MARKERS, Vocabulary
from tele_jax.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model that leaves text as it is; see Vocabulary.

    Two things differ from the bare model. The character U+2581, which SentencePiece cannot tell from a space, is
    spelled in bytes, unless the model puts a space before every text: the released ones took it for a space in their
    training. And dialogue markers that the file says to find in text are not found in text.

    Attributes:
      sp_model: the serialized model as it is used here.
      tokenizer: the sentencepiece.SentencePieceProcessor.
    """

    def _open(self, serialized: bytes) -> None:
        sentencepiece = need("sentencepiece")
        model_pb2 = need("sentencepiece.sentencepiece_model_pb2")
        try:
            model = model_pb2.ModelProto.FromString(serialized)
            if not model.pieces:
                raise ValueError("no pieces: an empty file is one, to protobuf")
            types = model_pb2.ModelProto.SentencePiece
            _check_lossless(self.path, model)
            for piece in model.pieces:
                if piece.piece in MARKERS and piece.type == types.USER_DEFINED:
                    piece.type = types.CONTROL
            self.sp_model = model.SerializeToString()
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=self.sp_model)
            self.vocab_size = self.tokenizer.get_piece_size()
        except UserError:
            raise
        except Exception:  # protobuf and sentencepiece raise several unrelated types
            raise UserError(
                f"tokenizer {self.path}: not a SentencePiece model, and no JSON file of the tokenizers library"
            ) from None
        self.unk_id = self.tokenizer.unk_id()
        self.bos_id = self.tokenizer.bos_id()
        self.eos_id = self.tokenizer.eos_id()
        self.pad_id = self.tokenizer.pad_id()
        self._space_ids = [self.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.spells_bytes = self.unk_id not in self._space_ids
        self.adds_dummy_prefix = model.normalizer_spec.add_dummy_prefix
        self._space_byte_id = self.tokenizer.piece_to_id("<0x20>") if self.spells_bytes else -1
        # The released models, which have a dummy prefix, took U+2581 for a space in their training: they get the ids
        # that they know.
        self._spells_space = self.spells_bytes and not self.adds_dummy_prefix

    def _encode(self, text: str) -> list[int]:
        if SPACE not in text or not self._spells_space:
            return self.tokenizer.encode(text)
        ids = []
        for i, part in enumerate(text.split(SPACE)):
            ids += (self._space_ids if i else []) + self.tokenizer.encode(part)
        return ids

    def _encode_bare(self, text: str) -> list[int]:
        return self._bare_tokenizer.encode(text)

    @functools.cached_property
    def _bare_tokenizer(self) -> Any:
        """This model without its dummy prefix."""
        model = need("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(self.sp_model)
        model.normalizer_spec.add_dummy_prefix = False
        return need("sentencepiece").SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """int32[n] for every text, the same ids as `encode`, on so many threads."""
        ids = self.tokenizer.encode(list(texts), num_threads=threads, return_type="numpy")
        for i, text in enumerate(texts):
            if SPACE in text:  # which SentencePiece cannot tell from a space
                ids[i] = np.array(self.encode(text), np.int32)
        return ids

    def find(self, piece: str) -> int | None:
        """The id of a piece by its name; None where there is none."""
        found = self.tokenizer.piece_to_id(piece)
        return found if self.tokenizer.id_to_piece(found) == piece else None

    def piece(self, i: int) -> str:
        """The name of the piece with this id."""
        return self.tokenizer.id_to_piece(i)

    def _spell(self, i: int) -> bytes:
        processor = self.tokenizer
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return b""
        piece = processor.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    @property
    def tf_tokenizer(self) -> Any:
        """A tensorflow_text.SentencepieceTokenizer of the same model.

        It is made anew at every call: it belongs to the graph that it is made in, and every dataset has its own.
        """
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


def _check_lossless(path: str, model: Any) -> None:
    """Raises UserError unless text comes back from its ids exactly, but for the space of a dummy prefix."""
    normalizer = model.normalizer_spec
    changes = {
        f"its normalizer {normalizer.name!r} changes characters": normalizer.precompiled_charsmap,
        "it joins repeated spaces (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "it does not mark spaces (escape_whitespaces)": not normalizer.escape_whitespaces,
        "it moves spaces behind words (treat_whitespace_as_suffix)": model.trainer_spec.treat_whitespace_as_suffix,
    }
    if found := [change for change, holds in changes.items() if holds]:
        raise UserError(
            f"tokenizer {path}: {'; '.join(found)}, so that text would not come back as it was; tele tokenizer train "
            "makes one that leaves text as it is (in SentencePiece: normalization_rule_name=identity, "
            "remove_extra_whitespaces=false)"
        )

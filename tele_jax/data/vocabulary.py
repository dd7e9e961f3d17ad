"""Reading vocabulary files: a SentencePiece model, or a JSON file of the `tokenizers` library (load_vocabulary)."""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tele_jax import files
from tele_jax.data.vocabulary_base import MARKERS, MISSING, SPECIAL_IDS, Vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import PathLike, Table

# Name of the tokenizer file beside or above the checkpoints that it belongs to, by kind of file.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


def load_vocabulary(path: PathLike) -> Vocabulary:
    """Reads a vocabulary file, once as long as the file does not change.

    Raises:
      UserError: there is no such file, it is of neither kind, or the library for it is not installed.
    """
    files.require_regular(path, "tokenizer ", missing=MISSING)
    status = os.stat(path)
    return _read(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(path: str, size: int, modified: int) -> Vocabulary:
    del size, modified  # so that a changed file is read again
    return (TokenizersVocabulary if is_tokenizers_json(path) else SentencePieceVocabulary)(path)


def is_tokenizers_json(path: PathLike) -> bool:
    """Tells JSON by the first byte of the file; a SentencePiece model begins with another one."""
    start = files.read_bytes(path, "tokenizer ", missing=MISSING)[:64]
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def tokenizer_name(path: PathLike) -> str:
    """Returns the name under which a tokenizer file travels with checkpoints: one of TOKENIZER_FILES."""
    return TOKENIZER_FILES[is_tokenizers_json(path)]


def tokenizer_in(directory: files.AnyPath) -> files.AnyPath | None:
    """Returns the tokenizer file that a cache or a work directory carries; None where there is none."""
    return next((file for name in TOKENIZER_FILES if (file := directory / name).is_file()), None)


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model that leaves text as it is; see Vocabulary.

    Two things differ from the bare model. The character U+2581, which SentencePiece cannot tell from a space, is
    spelled in bytes, except by models with a dummy prefix: the released ones took U+2581 for a space in training. And
    dialogue markers are not found in text, even if the file asks for it.

    Attributes:
      sp_model: the serialized model as it is used here.
      tokenizer: the sentencepiece.SentencePieceProcessor.
    """

    def _open(self, serialized: bytes) -> None:
        sentencepiece = need("sentencepiece")
        model_pb2 = need("sentencepiece.sentencepiece_model_pb2")
        decode_error = need("google.protobuf.message").DecodeError
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
        # The first is protobuf's; sentencepiece turns its status codes into the others.
        except (decode_error, ValueError, RuntimeError, OSError, IndexError, SyntaxError):
            raise UserError(
                f"tokenizer {self.path}: not a SentencePiece model, and no JSON file of the tokenizers library"
            ) from None
        self.unk_id, self.bos_id = self.tokenizer.unk_id(), self.tokenizer.bos_id()
        self.eos_id, self.pad_id = self.tokenizer.eos_id(), self.tokenizer.pad_id()
        self._space_ids = [self.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.spells_bytes = self.unk_id not in self._space_ids
        self.adds_dummy_prefix = model.normalizer_spec.add_dummy_prefix
        self._space_byte_id = self.tokenizer.piece_to_id("<0x20>") if self.spells_bytes else -1
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
        """A processor of this model without its dummy prefix."""
        model = need("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(self.sp_model)
        model.normalizer_spec.add_dummy_prefix = False
        return need("sentencepiece").SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Returns int32[n] for every text, the same ids as `encode`, on `threads` threads."""
        ids = self.tokenizer.encode(list(texts), num_threads=threads, return_type="numpy")
        for i, text in enumerate(texts):
            if SPACE in text:  # which SentencePiece cannot tell from a space
                ids[i] = np.array(self.encode(text), np.int32)
        return ids

    def find(self, piece: str) -> int | None:
        """Returns the id of a piece by its name; None where there is none."""
        found = self.tokenizer.piece_to_id(piece)
        return found if self.tokenizer.id_to_piece(found) == piece else None

    def piece(self, i: int) -> str:
        """Returns the name of the piece with this id."""
        return self.tokenizer.id_to_piece(i)

    def _spell(self, i: int) -> bytes:
        processor = self.tokenizer
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return b""
        piece = processor.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    @property
    def tf_tokenizer(self) -> Any:
        """A new tensorflow_text.SentencepieceTokenizer of the model, which belongs to the current TensorFlow graph."""
        need("tensorflow")
        return need("tensorflow_text").SentencepieceTokenizer(model=self.sp_model)

    def encode_tf(self, text: object) -> Any:
        """Turns tf.string [] into tf.int32 [n], the same ids as `encode`."""
        tf = need("tensorflow")
        if not self._spells_space:
            return self.tf_tokenizer.tokenize(text)
        parts = self.tf_tokenizer.tokenize(tf.strings.split(text, SPACE))
        space = tf.tile(tf.constant([self._space_ids], tf.int32), [parts.nrows(), 1])
        return tf.concat([parts, space], axis=1).flat_values[: -len(self._space_ids)]

    def decode_tf(self, ids: Any) -> Any:
        """Turns tf.int32 [n] or [B, n] into tf.string [] or [B], up to the first EOS."""
        tf = need("tensorflow")
        ended = tf.cumsum(tf.cast(ids == self.eos_id, tf.int32), axis=-1) > 0
        return self.tf_tokenizer.detokenize(tf.where(ended, self.eos_id, tf.where(ids < self.vocab_size, ids, 0)))


def _check_lossless(path: str, model: Any) -> None:
    """Raises UserError unless text comes back from its ids exactly, apart from the space of a dummy prefix."""
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


# The JSON file does not say which pieces are special; these names are used by the released families and by Llama.
_UNK, _BOS = ("<unk>", "<_unk>"), ("<_start>", "<s>", "<|begin_of_text|>")
_EOS, _PAD = ("<_end>", "</s>", "<|end_of_text|>", "<|endoftext|>"), ("<_pad>", "<pad>")


def _alphabet() -> dict[str, int]:
    """Returns the byte that each character of byte-level BPE stands for (GPT-2); printable bytes stay themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _alphabet()
_LETTERS = {byte: letter for letter, byte in BYTES.items()}
_PROBE = "".join(map(chr, range(128))) + "  a \n\n\u2581\u3000\u753b "  # what pre-tokenizers may drop
_IN_UTF8 = set(range(0xF5)) - {0xC0, 0xC1}  # the bytes that valid UTF-8 has
# Control characters, and what begins characters of the planes from 4 on: hardly any text has them, and a tokenizer may
# lack pieces for them (SmolLM2's does). `encode` refuses a text that has one.
_RARE = bytes({*range(0x20), 0x7F, 0xF1, 0xF2, 0xF3, 0xF4} - set(b"\t\n\r"))


class TokenizersVocabulary(Vocabulary):
    """A byte-level BPE of the `tokenizers` library, the format of TeleChat-7B; see Vocabulary.

    Special tokens are not found in text, and text is not truncated, padded, stripped or extended, even if the file asks
    for it.

    Attributes:
      tokenizer: the tokenizers.Tokenizer.
    """

    def _open(self, serialized: bytes) -> None:
        tokenizers = need("tokenizers")
        try:
            description = json.loads(serialized)
            added = {token["content"]: token for token in description.get("added_tokens") or []}
            _check_json_lossless(self.path, description)
            for name, token in added.items():
                token["special"] = token["special"] or name in MARKERS
                token["lstrip"] = token["rstrip"] = False  # they take white space away
            self.tokenizer = _quiet(tokenizers.Tokenizer.from_str(json.dumps(description)))
        except UserError:
            raise
        except Exception as error:  # json's own, KeyError and the like, and the bare Exception of tokenizers
            raise UserError(f"tokenizer {self.path}: not a JSON file of the tokenizers library ({error})") from None
        self._ids: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        for name, token in added.items():
            if self._ids.get(name) != token["id"]:
                raise UserError(
                    f"tokenizer {self.path}: gives the added token {name!r} the id {token['id']}, but read in order it "
                    f"gets {self._ids.get(name)}: damaged, or of another version of the tokenizers library"
                )
        self.vocab_size = 1 + max(self._ids.values())
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = map(self._first, (_UNK, _BOS, _EOS, _PAD))
        self._unspelled = bytes(byte for byte in sorted(_IN_UTF8) if _LETTERS[byte] not in self._ids)
        self.spells_bytes = not self._unspelled
        if needed := self._unspelled.translate(None, _RARE):
            raise UserError(f"tokenizer {self.path}: no piece for {len(needed)} bytes, the first 0x{needed[0]:02X}")
        prefixing = [part for part in _parts(description, "pre_tokenizer") if part.get("add_prefix_space")]
        self.adds_dummy_prefix = bool(prefixing)
        for part in prefixing:  # the same objects as in the description
            part["add_prefix_space"] = False
        self._bare_tokenizer = (
            _quiet(tokenizers.Tokenizer.from_str(json.dumps(description))) if prefixing else self.tokenizer
        )
        self._control = {self._ids[name] for name, token in added.items() if token["special"]}
        self._control |= {self._ids[name] for name in (*MARKERS, *_UNK) if name in self._ids}
        if self.family is not None:
            self._control |= set(SPECIAL_IDS[self.family].values())
        self._verbatim = {self._ids[name] for name in added}
        probe = _PROBE.translate(dict.fromkeys(self._unspelled))
        if not self.adds_dummy_prefix and self.decode(self.encode(probe)) != probe:
            raise UserError(
                f"tokenizer {self.path}: its pre-tokenizer drops text, so that it would not come back as it was"
            )

    def _first(self, names: tuple[str, ...]) -> int:
        return next((self._ids[name] for name in names if name in self._ids), -1)

    def _encode(self, text: str) -> list[int]:
        return self._ids_of(self.tokenizer, text)

    def _encode_bare(self, text: str) -> list[int]:
        return self._ids_of(self._bare_tokenizer, text)

    def _ids_of(self, tokenizer: Any, text: str) -> list[int]:
        if self._unspelled and len(raw := text.encode()) > len(raw.translate(None, self._unspelled)):
            at = next(i for i, byte in enumerate(raw) if byte in self._unspelled)
            raise UserError(f"tokenizer {self.path}: it has no piece for the byte 0x{raw[at]:02X}, at {at} of the text")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if self._control.isdisjoint(ids):
            return ids
        # The model's own vocabulary can hold a special token as a word; spelled in bytes it is plain text.
        return [self._ids[letter] for letter in map(_LETTERS.__getitem__, text.encode())]

    def find(self, piece: str) -> int | None:
        """Returns the id of a piece by its name; None where there is none."""
        return self._ids.get(piece)

    def piece(self, i: int) -> str:
        """Returns the name of the piece with this id."""
        return self.tokenizer.id_to_token(i) or ""

    def _spell(self, i: int) -> bytes:
        name = self.tokenizer.id_to_token(i)
        if name is None or i in self._control:
            return b""
        if i in self._verbatim or not BYTES.keys() >= set(name):
            return name.encode()
        return bytes(BYTES[letter] for letter in name)


def _quiet(tokenizer: Any) -> Any:
    """Makes a tokenizer read special tokens in text as plain text, and cut and pad nothing; returns it."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(description: Table, field: str) -> list[Table]:
    """Returns the components of a field, which is one component or a Sequence."""
    part = description.get(field) or {}
    lists = {"pre_tokenizer": "pretokenizers", "decoder": "decoders", "normalizer": "normalizers"}
    return part[lists[field]] if part.get("type") == "Sequence" else [part] if part else []


def _check_json_lossless(path: str, description: Table) -> None:
    """Raises UserError unless text comes back from its ids exactly."""
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if description["model"].get(field):
            raise UserError(f"tokenizer {path}: its {field} is in no text, so that text would not come back as it was")
    if description["model"].get("type") != "BPE":
        raise UserError(f"tokenizer {path}: its model is {description['model'].get('type')}, only BPE is read here")
    if not any(part.get("type") == "ByteLevel" for part in _parts(description, "pre_tokenizer")):
        raise UserError(
            f"tokenizer {path}: not a byte-level BPE; if a SentencePiece model came with it, take that file"
        )
    if _parts(description, "normalizer"):
        raise UserError(f"tokenizer {path}: its normalizer changes text, so that it would not come back as it was")

"""Reading a byte-level BPE vocabulary in the JSON format of the `tokenizers` library, as TeleChat-7B was released."""

import json
from typing import Any

import numpy as np

from tele_jax.data.extras import need
from tele_jax.data.vocabulary import MARKERS, SPECIAL_IDS, Vocabulary
from tele_jax.errors import UserError

# The JSON does not say which piece plays which part; these are the names that our families and Llama's relatives use.
_UNK, _BOS = ("<unk>", "<_unk>"), ("<_start>", "<s>", "<|begin_of_text|>")
_EOS, _PAD = ("<_end>", "</s>", "<|end_of_text|>", "<|endoftext|>"), ("<_pad>", "<pad>")


def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes a byte as a printable character: itself where it is one, else 256 on in order (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _alphabet()
_LETTERS = {byte: letter for letter, byte in BYTES.items()}
_PROBE = "".join(map(chr, range(128))) + "  a \n\n\u2581\u3000\u753b "  # what pre-tokenizers may drop
_IN_UTF8 = set(range(0xF5)) - {0xC0, 0xC1}  # the bytes that valid UTF-8 has


class TokenizersVocabulary(Vocabulary):
    """A byte-level BPE of the `tokenizers` library; see Vocabulary.

    What differs from the bare file: special tokens are not found in text, and nothing is truncated, padded, stripped
    or added to a text, whatever the file asks for.

    Attributes:
      tokenizer: the tokenizers.Tokenizer.
    """

    def _open(self, serialized: bytes) -> None:
        tokenizers = need("tokenizers")
        try:
            description = json.loads(serialized)
            added = {token["content"]: token for token in description.get("added_tokens") or []}
            _check_lossless(self.path, description)
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
        self.spells_bytes = True
        if missing := [byte for byte in sorted(_IN_UTF8) if _LETTERS[byte] not in self._ids]:
            raise UserError(f"tokenizer {self.path}: no piece for {len(missing)} bytes, the first 0x{missing[0]:02X}")
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
        if not self.adds_dummy_prefix and self.decode(self.encode(_PROBE)) != _PROBE:
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
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if self._control.isdisjoint(ids):
            return ids
        # A special token that the vocabulary of the model also holds as a word: letter by letter it is none.
        return [self._ids[letter] for letter in map(_LETTERS.__getitem__, text.encode())]

    def find(self, piece: str) -> int | None:
        """The id of a piece by its name; None where there is none."""
        return self._ids.get(piece)

    def piece(self, i: int) -> str:
        """The name of the piece with this id."""
        return self.tokenizer.id_to_token(i) or ""

    def _spell(self, i: int) -> bytes:
        name = self.tokenizer.id_to_token(i)
        if name is None or i in self._control:
            return b""
        if i in self._verbatim or not BYTES.keys() >= set(name):
            return name.encode()
        return bytes(BYTES[letter] for letter in name)

    def encode_tf(self, text: Any) -> Any:
        """tf.string [] -> tf.int32 [n], the same ids as `encode`; calls Python."""
        tf = need("tensorflow")

        def encode(raw: bytes) -> np.ndarray:
            return np.array(self.encode(raw.decode()), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [text], tf.int32, stateful=False), [None])

    def decode_tf(self, ids: Any) -> Any:
        """tf.int32 [n] or [B, n] -> tf.string [] or [B], up to the first EOS; calls Python."""
        tf = need("tensorflow")

        def decode(rows: np.ndarray) -> np.ndarray:
            texts = np.empty(rows.shape[:-1], object)
            for row in np.ndindex(texts.shape):
                texts[row] = self.decode(rows[row]).encode()
            return texts

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.ensure_shape(text, tf.convert_to_tensor(ids).shape[:-1])


def _quiet(tokenizer: Any) -> Any:
    """The tokenizer, told to take special tokens for the text that they are, and to cut and pad nothing."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(description: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The components of a field, whether it is one or a Sequence of several."""
    part = description.get(field) or {}
    lists = {"pre_tokenizer": "pretokenizers", "decoder": "decoders", "normalizer": "normalizers"}
    return part[lists[field]] if part.get("type") == "Sequence" else [part] if part else []


def _check_lossless(path: str, description: dict[str, Any]) -> None:
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

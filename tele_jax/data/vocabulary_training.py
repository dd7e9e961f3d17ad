"""Training a vocabulary with the options and the special ids of the published ones (arXiv 2404.16645, 2401.03804)."""

import collections
import dataclasses
import glob
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tele_jax.data import documents, sources
from tele_jax.data.dialogue_formats import READERS
from tele_jax.data.vocabulary import SPACE, SentencePieceVocabulary
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import expand, read_bytes, replacing, require_regular

DIGITS = tuple("0123456789")
# The released file has ten emoji here, which label what a teacher thought of a text. Which ones they are is not
# published: these are ours.
EMOJI = tuple("👍👎😀😐🙁😡🎉💡🔥❌")
MAX_SENTENCE_BYTES = 100_000  # published
MIN_COVERAGE = 0.98  # SentencePiece's
# Inside SentencePiece a word is at most 65,535 symbols, and a text without spaces is one word.
_MAX_SENTENCE_CHARS = 50_000


@dataclasses.dataclass(frozen=True)
class Preset:
    """The special ids of a published vocabulary.

    Attributes:
      unk, bos, eos, pad: the pieces at ids 0 to 3.
      visible: pieces from id 4 on that are found in text, each always a token of its own.
      hidden: the pieces after them, never found in text.
    The 256 bytes follow, then the learned pieces.
    """

    unk: str
    bos: str
    eos: str
    pad: str
    visible: tuple[str, ...]
    hidden: tuple[str, ...]

    @property
    def first_byte_id(self) -> int:
        """The id of the byte 0x00."""
        return 4 + len(self.visible) + len(self.hidden)

    @property
    def first_learned_id(self) -> int:
        """The id of the first learned piece."""
        return self.first_byte_id + 256


def _reserved(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"<reserved_{i}>" for i in range(first, last + 1))


PRESETS = {
    # Ids 25 to 124 are reserved in the released file. That the dialogue markers take the first four is ours: the
    # released dialogue models of this family write their markers as plain text or do not publish them.
    "tele_flm": Preset(
        unk="<unk>",
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        visible=(*DIGITS, *EMOJI, "_"),
        hidden=("<_user>", "<_bot>", "<_end>", "<_system>", *_reserved(4, 99)),
    ),
    # What is at 4 to 19 is not published. Digits at 4 to 13, as in tele_flm, and reserved pieces up to 19 are ours.
    "telechat_12b": Preset(
        unk="<unk>",
        bos="<_start>",
        eos="<_end>",
        pad="<_pad>",
        visible=DIGITS,
        hidden=(*_reserved(0, 5), "<_user>", "<_bot>", "<_system>", *_reserved(6, 105)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained vocabulary: the model file's bytes, and what it was made from."""

    model: bytes
    documents: int
    num_bytes: int
    character_coverage: float


def train_vocabulary(
    texts: Iterable[str], *, preset: str, vocab_size: int, character_coverage: float | None = None
) -> Trained:
    """Trains a byte-level BPE vocabulary; the same texts give the same bytes.

    Args:
      texts: documents. A long one is cut into sentences of at most 100,000 bytes, line ends kept.
      preset: a name in PRESETS.
      vocab_size: number of ids, special ones and bytes included.
      character_coverage: share of all characters in the texts that get an id even if no merge needs it; the others
        are spelled in bytes. None: 1.0 as published, or, where that would leave less than half of the learned ids to
        merges (a small vocabulary for Chinese), as much as leaves that half, but no less than 0.98.

    Raises:
      UserError: an unknown preset, no text, a vocab_size that is too small for the special ids or too large for the
        texts, or sentencepiece is not installed.
    """
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    layout = PRESETS[preset]
    learned = vocab_size - layout.first_learned_id
    if learned < 2:
        raise UserError(
            f"vocab_size={vocab_size}: the preset {preset} has {layout.first_learned_id} special pieces and bytes; "
            f"give at least {layout.first_learned_id + 2}"
        )
    characters: collections.Counter[str] = collections.Counter()
    sentences, documents = [], 0
    for text in texts:
        documents += 1
        # SentencePiece takes U+2581 for a space, and drops every sentence with U+2585, its mark for the unknown.
        text = text.replace(SPACE, "").replace("\u2585", "")
        characters.update(text)
        sentences += [text[cut] for cut in _cuts(text)]
    num_bytes = sum(len(character.encode()) * count for character, count in characters.items())
    if not num_bytes:
        raise UserError("there is no text to train a vocabulary on")
    if character_coverage is None:
        character_coverage = max(_coverage(characters, layout, learned // 2), MIN_COVERAGE)
    if not MIN_COVERAGE <= character_coverage <= 1:
        raise UserError(f"character coverage {character_coverage}: SentencePiece takes {MIN_COVERAGE} to 1")
    model = _fit(sentences, layout, vocab_size, character_coverage)
    return Trained(model, documents, num_bytes, character_coverage)


def _cuts(text: str) -> Iterator[slice]:
    """Yields slices that cover the text, below SentencePiece's limits, cut after a line end where there is one."""
    begin = 0
    while begin < len(text):
        # A character has at most four bytes.
        limit = _MAX_SENTENCE_CHARS if text.isascii() else MAX_SENTENCE_BYTES // 4
        end = begin + limit
        if end < len(text):
            newline = text.rfind("\n", begin + limit // 2, end)
            end = newline + 1 if newline >= 0 else end
        yield slice(begin, end)
        begin = end


def _coverage(characters: collections.Counter[str], layout: Preset, room: int) -> float:
    """Returns the share of the text that its `room` most frequent characters make up."""
    counts = sorted((n for c, n in characters.items() if c not in layout.visible), reverse=True)
    if len(counts) <= room:
        return 1.0
    # Between the two counts, so that rounding to float32 does not decide over the last character.
    return (sum(counts[:room]) - counts[room - 1] / 2) / sum(counts)


def _fit(sentences: Sequence[str], layout: Preset, vocab_size: int, character_coverage: float) -> bytes:
    sentencepiece = need("sentencepiece")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=character_coverage,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=layout.unk,
            bos_piece=layout.bos,
            eos_piece=layout.eos,
            pad_piece=layout.pad,
            user_defined_symbols=[*layout.visible, *layout.hidden],
            # Not published. Without it a text's tokens do not depend on whether something comes before it, and
            # parts that are encoded apart (the spans of a long document, the turns of a dialogue) join exactly.
            add_dummy_prefix=False,
            # We sample ourselves, by seed; and the number of threads is written into the file: a constant.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"vocab_size={vocab_size}: {_reason(error)}") from None
    return _hide(out.getvalue(), layout)


def _reason(error: Exception) -> str:
    """Returns the message of SentencePiece without the place in its source code."""
    return str(error).split("] ")[-1].strip() or f"SentencePiece failed: {error}"


def _hide(model: bytes, layout: Preset) -> bytes:
    """Turns the hidden pieces, which had to be trained as visible ones to get their ids, into control pieces."""
    model_pb2 = need("sentencepiece.sentencepiece_model_pb2")
    proto = model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces[4 + len(layout.visible) : layout.first_byte_id]:
        piece.type = model_pb2.ModelProto.SentencePiece.CONTROL
    return proto.SerializeToString(deterministic=True)


def misplaced(vocabulary: Vocabulary, preset: str) -> list[str]:
    """Lists the special pieces of the preset that are not at their ids, as "<_user> is not at id 20"."""
    layout = PRESETS[preset]
    expected = [layout.unk, layout.bos, layout.eos, layout.pad, *layout.visible, *layout.hidden]
    expected += [f"<0x{byte:02X}>" for byte in range(256)]
    if vocabulary.vocab_size < len(expected):
        return [f"it has only {vocabulary.vocab_size} ids"]
    pieces = map(vocabulary.piece, range(len(expected)))
    return [f"{name} is not at id {i}" for i, (name, piece) in enumerate(zip(expected, pieces)) if name != piece]


def write_vocabulary(trained: Trained, path: Path, *, preset: str, force: bool = False) -> Vocabulary:
    """Writes the model file, all of it or nothing, and reads it back.

    Raises:
      UserError: another file is there and `force` is not given.
      AssertionError: a special piece is not at its id: SentencePiece does not do what it did when this was written.
    """
    if path.exists() and read_bytes(path) == trained.model:
        return SentencePieceVocabulary(path)
    if path.exists() and not force:
        raise UserError(f"{path}: is there already and differs; choose another name, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(trained.model)
        wrong = misplaced(SentencePieceVocabulary(temporary), preset)
        assert not wrong, f"{preset}: {'; '.join(wrong[:3])}"
    return SentencePieceVocabulary(path)


def format_of(path: str) -> documents.Format:
    """Returns the format of an input file: `text`, or for a .jsonl file what its first line holds."""
    if not path.endswith(".jsonl"):
        return "text"
    require_regular(path)
    with open(path, "rb") as file:
        try:
            first = json.loads(file.readline())
        except (ValueError, RecursionError):
            return "jsonl"
    keys = set(first) if isinstance(first, dict) and "text" not in first else set()
    return "dialogues" if any(keys.issuperset(needed) for needed, _ in READERS.values()) else "jsonl"


def sample_texts(patterns: Sequence[str], *, max_bytes: int | None, seed: int) -> Iterator[str]:
    """Returns the texts of all files, or, if they hold more than `max_bytes`, a random sample of about so many bytes.

    The files are all checked before the first text comes. Text is drawn in pieces of a document's size or
    MAX_SENTENCE_BYTES, whichever is less, uniformly over all files.

    Raises:
      UserError: as sources.index; a document that cannot be used, unless it is only empty.
    """
    corpora = [
        sources.index("INPUT", path, [glob.escape(path)], format_of(path), span_bytes=MAX_SENTENCE_BYTES)
        for path in expand(patterns, "INPUT")
    ]
    for corpus in corpora:
        for reject in corpus.rejected:
            if reject["reason"] != documents.EMPTY:
                raise UserError(f"{documents.place(reject)}; convert or leave out")
        if corpus.num_rejected > len(corpus.rejected):
            raise UserError(f"{corpus.account()}; leave them out")
    places = [(corpus, i) for corpus in corpora for i in range(len(corpus))]
    sizes = np.concatenate([corpus.spans["num_bytes"] for corpus in corpora])
    chosen = np.arange(len(places))
    if max_bytes is not None and sizes.sum() > max_bytes:
        order = np.random.default_rng(seed).permutation(len(places))
        enough = int(np.searchsorted(np.cumsum(sizes[order]), max_bytes)) + 1
        chosen = np.sort(order[:enough])
    return (_text(corpus.document(i)) for corpus, i in map(places.__getitem__, chosen))


def _text(document: documents.Document) -> str:
    content = document.content
    return content if isinstance(content, str) else "\n".join(m["content"] for m in content if isinstance(m, Mapping))

"""The text that models are evaluated on: its settings, its documents, and the floor that xz sets."""

import dataclasses
import hashlib
import lzma
from collections.abc import Iterable, Iterator, Sequence

from tele_jax.config import ModelConfig, check_seed, require, require_positive
from tele_jax.data.documents import EMPTY, Reject, open_text, place, read_document
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError, abridged
from tele_jax.files import expand

KEYS = ("text", "data")  # names of the text in a JSON line; the released text of TeleChat has the second
FLOOR_BYTES = 10**6  # size of the pieces that xz compresses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpbConfig:
    """Settings of `tele eval bpb`."""

    # Files of each domain, as paths or glob patterns. A line of a .jsonl file is {"text": ...} or {"data": ...}; any
    # other file is one document.
    text: dict[str, tuple[str, ...]]
    window: int | None = (
        None  # tokens that the model reads at once; None: its max_seq_len. Above: with NTK scaling alone
    )
    stride: int | None = None  # new tokens that each further window of a document scores; None: the window
    eos: bool = False  # also scores the end of sequence after each document; it adds no byte
    by_position: bool = False  # also prints the figures by the position of a token in its document
    resamples: int = 1000  # resamplings of the documents for the intervals
    seed: int = 0  # seed of the resamplings

    def __post_init__(self):
        require(bool(self.text), "text: no domain; give DOMAIN=FILES, for example --text en=held_out/*.jsonl")
        for name, patterns in self.text.items():
            require(
                name.isprintable() and name.strip() == name != "" and "=" not in name,
                f"text: {name!r} is no name for a domain",
            )
            require(bool(patterns), f"text.{name}: no file; give at least one path or pattern")
        require(self.window is None or self.window >= 2, f"window={self.window} must be at least 2 tokens")
        require_positive(self, "resamples", *(["stride"] if self.stride is not None else []))
        if self.window is not None:
            self._require_stride(self.window)
        check_seed(self.seed)

    def _require_stride(self, window: int) -> None:
        require(
            self.stride is None or self.stride <= window,
            f"stride={self.stride} is above the window of {window} tokens, and would leave tokens out",
        )

    def sizes(self, cfg: ModelConfig, vocabulary: Vocabulary) -> tuple[int, int]:
        """(window, stride) for a model; raises UserError where the model has fewer positions, or no id for `eos`."""
        window = cfg.max_seq_len if self.window is None else self.window
        require(window >= 2, f"window: max_seq_len={cfg.max_seq_len} of the model is below 2 tokens")
        require(
            window <= cfg.max_seq_len or cfg.rope.ntk is not None,
            f"window={window} is above the model's max_seq_len={cfg.max_seq_len}, and the model has no NTK scaling",
        )
        self._require_stride(window)
        require(not self.eos or vocabulary.eos_id >= 0, f"eos: the tokenizer {vocabulary.path} has no end of sequence")
        return window, window if self.stride is None else self.stride


@dataclasses.dataclass(frozen=True)
class Domain:
    """The text of a domain: its files, and what is known without a model.

    Attributes:
      documents: (digest of the text, its UTF-8 bytes) of every document in order; bytes of 0 for an empty one.
      xz: bits per byte of the text after xz, see `survey`.
    """

    name: str
    files: tuple[str, ...]
    documents: Sequence[tuple[str, int]]
    xz: float

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(size for _, size in self.documents)


def read_texts(files: Iterable[str]) -> Iterator[str]:
    """Yields the documents of files in order, "" for an empty one.

    Raises:
      UserError: a file that is missing, empty or compressed; a line that is not of the format, or not UTF-8.
    """
    for path in files:
        with open_text(path) as file:
            begin = file.tell()
            if not path.lower().endswith(".jsonl"):
                yield read_document(path, begin, file.read(), "text", _refuse)
                continue
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield read_document(path, begin, line, "jsonl", _refuse, {"line": number}, KEYS) or ""
                begin += len(line)


def _refuse(reject: Reject) -> None:
    if reject["reason"] != EMPTY:
        raise UserError(place(reject))


def key_of(data: bytes) -> str:
    """The digest that names a text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def survey(config: BpbConfig) -> list[Domain]:
    """Reads all text once, before any model is loaded, and computes the floor that xz sets.

    The documents of a domain, one after another, are cut into pieces of 10^6 bytes (FLOOR_BYTES; the last one is
    shorter), and each piece is compressed by itself with xz at its default level. A model whose bits per byte are above
    that has not learned the domain.

    Raises:
      UserError: as read_texts; a pattern that matches no file; a domain without text.
    """
    return [_survey(name, expand(patterns, f"text.{name}")) for name, patterns in config.text.items()]


def _survey(name: str, files: tuple[str, ...]) -> Domain:
    documents: list[tuple[str, int]] = []
    compressed, rest = 0, bytearray()
    for text in read_texts(files):
        data = text.encode()
        documents.append((key_of(data), len(data)))
        rest += data
        while len(rest) >= FLOOR_BYTES:
            compressed += len(lzma.compress(rest[:FLOOR_BYTES]))
            del rest[:FLOOR_BYTES]
    total = sum(size for _, size in documents)
    require(total > 0, f"text.{name}: there is not one document with text in {abridged(files)}")
    compressed += len(lzma.compress(rest)) if rest else 0
    return Domain(name, files, documents, 8 * compressed / total)

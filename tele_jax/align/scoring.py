"""Scores of a reward model for texts, dialogues, pairs and rankings in a file."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax import checkpoint
from tele_jax.align.pairs import compiled_scores
from tele_jax.config import require
from tele_jax.data import dialogue, documents
from tele_jax.data.dialogue_formats import READERS, from_record
from tele_jax.data.preferences import read_record
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table, write_file
from tele_jax.settings import DEFAULT_DIALOGUES, MeshConfig
from tele_jax.sharding import batch_sharding, make_mesh, put_batch, to_host

Z95 = 1.959963984540054  # of the normal distribution


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record: its place in the file, and the ids of each of its sequences, with the names that they get."""

    at: Table
    names: tuple[str, ...]
    sequences: list[list[int]]


def score_file(
    path: str,
    out: Path,
    model: checkpoint.Lazy,
    vocabulary: Vocabulary,
    *,
    max_tokens: int,
    batch_size: int = 16,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Scores every record of a file of JSON lines, or of one JSON array, and writes a line for each.

    A pair gives {"chosen", "rejected"}, a ranking {"answers": [...]} in its order, a dialogue or a text {"score"}; each
    with its "line" (or "element"). A text is read as it stands, with the end of a sequence behind it.

    Args:
      path, out: the file, and what is written, whole or not at all.
      model: a checkpoint of a reward model.
      vocabulary: its tokenizer.
      max_tokens: most tokens of a sequence; none is cut.
      batch_size: sequences at once.
      mesh: devices; None: one.
      progress: progress(sequences done, all).

    Returns {"records", "sequences", "mean", "std"} of all scores, and where there are pairs "pairs", "accuracy" (equal
    scores count half) and its 95% "interval" of Wilson's, for as many trials as there are pairs and rankings.

    Raises:
      UserError: no reward model; another tokenizer than the model was trained with; a record that cannot be scored, by
        its place; batch_size that does not divide over the mesh.
      DamageError: the checkpoint is damaged.
    """
    require_reward_model(model)
    model.cfg.require_positions(max_tokens)
    _check_tokenizer(model, vocabulary)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    try:
        batch_sharding(mesh, batch_size)
    except UserError:
        raise UserError(f"batch_size={batch_size} does not divide over the {mesh.size} devices of the mesh") from None
    found = list(_records(path, vocabulary, max_tokens))
    require(bool(found), f"{path}: holds nothing but blank lines")
    sequences = [ids for record in found for ids in record.sequences]
    params = checkpoint.load(model.path, mesh, items=("params",)).params
    scores = _scores(model, params, sequences, batch_size, mesh, progress)
    lines, rights, first = [], [], 0
    for record in found:
        own = scores[first : first + len(record.sequences)].tolist()
        first += len(own)
        named = {record.names[0]: own} if record.names == ("answers",) else dict(zip(record.names, own))
        lines.append(json.dumps({**record.at, **named}) + "\n")
        if len(own) > 1:
            signs = [np.sign(better - worse) for better, worse in itertools.combinations(own, 2)]
            rights.append((len(signs), float(np.sum((1 + np.array(signs)) / 2))))
    write_file(out, "".join(lines))
    figures: Table = {"records": len(found), "sequences": len(sequences)}
    figures |= {"mean": float(scores.mean()), "std": float(scores.std())}
    if rights:
        pairs, right = (sum(column) for column in zip(*rights))
        # Pairs of one ranking are not independent: as many trials are counted as there are records.
        interval = list(wilson(right / pairs, len(rights)))
        figures |= {"pairs": int(pairs), "accuracy": right / pairs, "interval": interval}
    return figures


def require_reward_model(model: checkpoint.Lazy) -> None:
    """Raises UserError for a checkpoint without a scalar head, or whose scalar head gives the values of PPO."""
    require(model.cfg.scalar_head, f"{model.path}: has no scalar head, so it is no reward model")
    kinds = [entry["kind"] for entry in model.provenance if entry.get("kind") in ("reward", "ppo")]
    what = "its scalar head gives values of PPO, not scores; name the checkpoint of a stage of kind reward"
    require(kinds[-1:] != ["ppo"], f"{model.path}: {what}")


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials (Wilson, 1927).

    >>> [round(end, 4) for end in wilson(0.5, 100)]
    [0.4038, 0.5962]
    """
    z2 = Z95**2 / count
    centre, half = share + z2 / 2, Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return (centre - half) / (1 + z2), (centre + half) / (1 + z2)


def _check_tokenizer(model: checkpoint.Lazy, vocabulary: Vocabulary) -> None:
    """Raises UserError where a model was trained with another tokenizer, or has fewer ids."""
    used = [entry["data"]["tokenizer"] for entry in model.provenance if "tokenizer" in (entry.get("data") or {})]
    if (used and used[-1] != vocabulary.sha256) or vocabulary.vocab_size > model.cfg.vocab_size:
        raise UserError(f"{model.path}: was trained with another tokenizer than {vocabulary.path}; name its own")


def _records(path: str, vocabulary: Vocabulary, max_tokens: int) -> Iterator[_Record]:
    def read(text: str) -> tuple[tuple[str, ...], list[list[int]]]:
        names, sequences = _sequences(documents.parse_record(text), vocabulary)
        if (most := max(map(len, sequences))) > max_tokens:
            raise UserError(f"{most:,} tokens, more than {max_tokens:,}")
        return names, sequences

    def refuse(entry: Table) -> None:
        raise UserError(documents.place(entry))

    with documents.open_text(path) as file:
        for offset, data, at in documents.records(file, "dialogues", lambda block: None):
            yield _Record(at, *documents.read_document(path, offset, data, read, refuse, at))


def _sequences(value: Any, vocabulary: Vocabulary) -> tuple[tuple[str, ...], list[list[int]]]:
    """Returns names of the sequences of a record, and their ids."""
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return ("score",), [[*vocabulary.encode(value["text"]), vocabulary.eos_id]]
    if isinstance(value, dict) and {"chosen", "answers"} & value.keys():
        found = read_record(value, "pairs", DEFAULT_DIALOGUES)
        prompt, answers = dialogue.render_answers(found.prompt, found.answers, vocabulary)
        return ("answers",) if "answers" in value else ("chosen", "rejected"), [prompt + answer for answer in answers]
    if not isinstance(value, dict) or not any(set(keys) <= value.keys() for keys, _ in READERS.values()):
        known = 'a pair ("chosen", "rejected"), a ranking ("answers"), a dialogue, or {"text": TEXT}'
        raise UserError(f"is neither {known}")
    messages = from_record(value)
    prompt, answers = dialogue.render_answers(messages[:-1], [messages[-1]["content"]], vocabulary)
    return ("score",), [prompt + answers[0]]


def _scores(
    model: checkpoint.Lazy,
    params: Any,
    sequences: Sequence[list[int]],
    batch_size: int,
    mesh: Mesh,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Scores, float32 [n]; sequences of like lengths go together, in at most eight widths."""
    lengths = np.array([len(ids) for ids in sequences])
    order, unit = np.argsort(lengths, kind="stable"), max(1, -(-int(lengths.max()) // 8))
    scores = np.zeros(len(sequences), np.float32)
    with jax.set_mesh(mesh):
        for first in range(0, len(order), batch_size):
            numbers = np.resize(order[first : first + batch_size], batch_size)  # the last are repeated to fill it
            ends = lengths[numbers].astype(np.int32)
            inside = np.arange(-(-int(ends.max()) // unit) * unit) < ends[:, None]
            tokens = np.zeros(inside.shape, np.int32)
            tokens[inside] = np.concatenate([sequences[i] for i in numbers.tolist()])
            positions = np.where(inside, np.arange(inside.shape[1]), 0).astype(np.int32)
            last = (np.arange(batch_size) * inside.shape[1] + ends - 1).astype(np.int32)
            rows = {"tokens": tokens, "segment_ids": inside.astype(np.int32), "positions": positions, "ends": last}
            scores[numbers] = to_host(compiled_scores(model.cfg, params, put_batch(rows, mesh, batch_size)))
            progress(min(first + batch_size, len(order)), len(order))
    return scores

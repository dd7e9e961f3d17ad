"""Replies that were drawn, as arrays: what is known of them when they are, and the rows that a stage trains on."""

import base64
import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from tele_jax.errors import DamageError
from tele_jax.files import Table

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Replies to prompts, N rows of prompt and reply.

    Attributes:
      tokens: int32 [N, S], the ids as they were drawn, the stop id that ended a reply among them; padded on the right.
      prompts, lengths: int32 [N], tokens of the prompt, and of prompt and reply together.
      sampler_logp: float32 [N, S], at the position before each drawn token, its log-probability when it was drawn.
      stopped: bool [N], whether a stop id ended the reply; otherwise it was cut at the limit.
      record: int32 [N], numbers of the prompts.
      group: int32 [N], the same for all replies to one prompt.
      rewards: float64 [N].
    """

    tokens: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray
    sampler_logp: np.ndarray
    stopped: np.ndarray
    record: np.ndarray
    group: np.ndarray
    rewards: np.ndarray

    def reply(self, row: int) -> list[int]:
        """The ids of a reply without the stop id."""
        return self.tokens[row, self.prompts[row] : self.lengths[row] - self.stopped[row]].tolist()

    def take(self, rows: np.ndarray) -> "Drawn":
        """Some of the rows."""
        return Drawn(**{name: array[rows] for name, array in vars(self).items()})


def drawn(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[tuple[Sequence[int], np.ndarray]],
    *,
    stop_ids: Sequence[int],
    seq_len: int,
    pad_id: int,
    record: np.ndarray,
    group: np.ndarray,
) -> Drawn:
    """Makes arrays [N, seq_len] of what generate_scored(keep_stop=True) returned; no row has a reward yet."""
    count = len(prompts)
    tokens, logps = np.full((count, seq_len), pad_id, np.int32), np.zeros((count, seq_len), np.float32)
    begins = np.array([len(prompt) for prompt in prompts], np.int32)
    ends = begins + np.array([len(reply) for reply, _ in replies], np.int32)
    for row, (prompt, (reply, logp)) in enumerate(zip(prompts, replies, strict=True)):
        tokens[row, : ends[row]] = [*prompt, *reply]
        logps[row, begins[row] - 1 : ends[row] - 1] = logp
    stopped = np.array([bool(reply) and reply[-1] in stop_ids for reply, _ in replies])
    return Drawn(tokens, begins, ends, logps, stopped, record, group, np.zeros(count))


def joined(parts: Sequence[Drawn]) -> Drawn:
    """All rows of several draws, whose groups stay apart."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    firsts = np.cumsum([0, *(int(part.group.max(initial=-1)) + 1 for part in parts)])
    arrays["group"] = np.concatenate([part.group + first for part, first in zip(parts, firsts)])
    return Drawn(**arrays)


def rows(found: Drawn, *, unit: int, pad_id: int) -> Arrays:
    """The rows to train on.

    Their width is that of the longest row, rounded up to a multiple of `unit`, so that few widths are compiled.
    tokens, targets int32 (the token after), segment_ids, positions int32, sampler_logp float32, and loss_weights
    float32: 1 where the target was drawn, the stop id among them. Ends are found by lengths, never by values of tokens.
    """
    width = min(-(-int(found.lengths.max()) // unit) * unit, found.tokens.shape[1])
    tokens, places = found.tokens[:, :width], np.arange(width)
    begins, ends = found.prompts[:, None], found.lengths[:, None]
    inside, ahead = places < ends, places < ends - 1
    return {
        "tokens": tokens,
        "targets": np.where(ahead, np.roll(tokens, -1, axis=1), pad_id).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, places, 0).astype(np.int32),
        "sampler_logp": found.sampler_logp[:, :width],
        "loss_weights": ((places >= begins - 1) & ahead).astype(np.float32),
    }


# ---- the state of a feed ---------------------------------------------------------------------------------------------


def pack(meta: Table, groups: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """Bytes of a JSON table and named groups of arrays; bytes in the table become text."""
    text = {name: base64.b64encode(v).decode() if isinstance(v, bytes) else v for name, v in meta.items()}
    arrays = {f"{group}/{name}": array for group, found in groups.items() for name, array in found.items()}
    buffer = io.BytesIO()
    arrays["meta"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType] - no array is named as an argument
    return buffer.getvalue()


def unpack(state: bytes) -> tuple[Table, dict[str, Arrays]]:
    """Takes apart what `pack` made; DamageError where it made no such bytes."""
    try:
        with np.load(io.BytesIO(state), allow_pickle=False) as found:
            meta = json.loads(found["meta"].tobytes())
            groups: dict[str, Arrays] = {}
            for name in found.files:
                group, _, array = name.partition("/")
                if array:
                    groups.setdefault(group, {})[array] = found[name]
        meta["prompts"] = base64.b64decode(meta["prompts"])
        return meta, groups
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DamageError(f"the saved rollout is damaged: {type(error).__name__}: {error}") from None

"""Files of a cleaning run: each appears whole or not at all."""

import base64
import gzip
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tele_jax.clean.document import Document, Reject, num_bytes
from tele_jax.clean.settings import OutputConfig
from tele_jax.errors import FailedError, UserError
from tele_jax.extras import need
from tele_jax.files import write_file

FORMAT = "tele_jax cleaned text 2"
TRAIN, VALIDATION = "train", "validation"  # splits; the files of training have no more than their number


def replace_file(path: str | Path, data: bytes) -> None:
    """Writes a local file or an object of a bucket: all of it, or FailedError and nothing.

    Raises:
      FailedError: the disk is full, or another failure of writing.
    """
    path = str(path)
    try:
        if "://" in path:  # an object appears when it is closed
            with need("apache_beam.io.filesystems").FileSystems.create(path, compression_type="uncompressed") as file:
                file.write(data)
            return
        write_file(path, data)
    except OSError as error:
        raise FailedError(f"{path}: cannot be written: {error.strerror or error}") from error


def open_model(path: str, format: str, made_by: str) -> dict[str, Any]:
    """The arrays of a file that `save` of a classifier or an n-gram model wrote; numbers only, nothing is unpickled.

    Raises:
      UserError: the file is missing or is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["format"]) == format:
                return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {made_by} makes it") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    raise UserError(f"{path}: not a {format!r} file; {made_by} makes it")


def compress(lines: Iterable[str], level: int) -> bytes:
    """gzip without name and time: the same bytes for the same lines (and the same zlib)."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=level, mtime=0) as file:
        for line in lines:
            file.write(line.encode("utf-8", "surrogatepass"))
    return buffer.getvalue()


def shard_of(uid: int, shards: int) -> int:
    """Which shard a document goes to: by a hash, so that shards are equal in size and each is a sample of the whole."""
    return int.from_bytes(hashlib.blake2b(uid.to_bytes(16, "big"), digest_size=8).digest(), "big") % shards


def split_of(document: Document, validation_share: float) -> str:
    """VALIDATION where the hash of the text is below `validation_share` of all hashes, else TRAIN.

    The text alone decides: it is on the same side in every run, whatever else a domain holds.
    """
    data = document.text.encode("utf-8", "surrogatepass")
    order = int.from_bytes(hashlib.blake2b(data, digest_size=8, person=VALIDATION.encode()).digest(), "big")
    return VALIDATION if order < validation_share * 2**64 else TRAIN


def record(document: Document) -> str:
    """A document as a line of JSON."""
    fields = {"text": document.text, "language": document.language, "source": document.source, "url": document.url}
    fields = {key: value for key, value in fields.items() if value is not None}
    return json.dumps({**fields, "origin": document.origin}, ensure_ascii=False) + "\n"


def write_shard(
    directory: str,
    domain: str,
    split: str,
    shard: int,
    shards: int,
    documents: Iterable[Document],
    config: OutputConfig,
) -> dict[str, Any]:
    """Writes one shard in the order of uids; returns its entry in the manifest."""
    documents = sorted(documents, key=lambda document: document.uid)
    prefix = f"{VALIDATION}-" if split == VALIDATION else ""
    name = f"{domain}/{prefix}{shard:05d}-of-{shards:05d}.jsonl"
    if config.compression == "gz":
        name, data = f"{name}.gz", compress(map(record, documents), config.level)
    else:
        data = "".join(map(record, documents)).encode("utf-8", "surrogatepass")
    replace_file(os.path.join(directory, name), data)
    return {
        "file": name,
        "split": split,
        "documents": len(documents),
        "text_bytes": sum(num_bytes(document.text) for document in documents),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def write_rejects(directory: str, source: str, rejects: Iterable[Reject]) -> dict[str, Any]:
    """Writes what could not be read of a source, bytes as base64; returns its entry in the manifest."""
    data = compress(_reject_lines(rejects), 6)
    name = f"rejects/{source}.jsonl.gz"
    replace_file(os.path.join(directory, name), data)
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _reject_lines(rejects: Iterable[Reject]) -> Iterator[str]:
    for reject in sorted(rejects, key=lambda reject: (reject.uid, reject.reason)):
        fields = {"origin": reject.origin, "reason": reject.reason, "detail": reject.detail}
        if reject.data:
            fields["base64"] = base64.b64encode(reject.data).decode()
        yield json.dumps(fields, ensure_ascii=False) + "\n"

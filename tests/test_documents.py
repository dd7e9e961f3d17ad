"""Every JSON document that is read, mutated, its checksum made right again: it is read, or refused in one line.

Fields are lost, added, doubled, renamed, given values of other types, numbers that are too large or none, names that
lead elsewhere, and lists inside lists; files are cut. Whatever a program had to make of that instead (KeyError,
TypeError, RecursionError, ...) fails here.
"""

import copy
import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint, convert, corpora, files, growth, report
from tele_jax.aot import compile as compiling
from tele_jax.cli import inspect
from tele_jax.config import to_dict
from tele_jax.convert.release import open_release
from tele_jax.data import cache, caching, documents, order, shards
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.growth import receipt as receipts
from tele_jax.growth.masks import require_unmasked
from tele_jax.settings import GrowStage
from tele_jax.stages import run_config
from tele_jax.train import metrics, workdir
from tests import reference
from tests.data import caches
from tests.data.test_vocabulary_tokenizers import byte_level
from tests.inference.test_chat import TEXTS, tokenizer_bytes

CFG = tele.ModelConfig(num_layers=1, embed_dim=4, num_heads=1, head_dim=2, mlp_dim=3, vocab_size=5, dtype="float32")
LARGER = CFG.replace(mlp_dim=4)
EXAMPLES = 200


# ---- mutations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Raw:
    """Text that stands in a document as it is."""

    text: str


STRANGE = [
    *(None, True, False, 0, -1, 1, 7, 2.5, -0.5, 1e308, 10**30, -(10**400)),
    *("", "x", ".", "..", "../x", "/outside", "a\\b", "a\0b", "n" * 300, "NaN", "float32", "embed", "\ud800"),
    *([], {}, [0], [[]], [None], ["x"], [-1, 10**12], {"x": 1}, {"": None}, [["x", 1.5], {}], [[0, 10**12]]),
    *(Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("[" * 3000 + "]" * 3000)),
    *(Raw('{"a":' * 80 + "1" + "}" * 80), Raw("tru"), Raw('"\\ud800"'), Raw("01")),
]


def places(value, found=()):
    """(container, key) of every value inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *places(item))]


def dump(value) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Doubled):
        pairs = [*value.table.items(), *list(value.table.items())[:1]]
        return "{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in pairs) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A table whose first key stands there twice."""

    table: dict


def mutated(document, rng: random.Random, seal: Callable[[dict], dict]) -> str:
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        choices = places(document)
        if not choices:
            return dump(rng.choice(STRANGE))
        container, key = rng.choice(choices)
        how = rng.randrange(10)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice(("x", "../x", "/outside", "a.b", ""))] = container.pop(key)
        elif how == 2 and isinstance(container, dict):
            container[rng.choice(("more", "_x", "kind", "__class__"))] = rng.choice(STRANGE)
        elif how == 3 and isinstance(container[key], dict) and container[key]:
            container[key] = Doubled(container[key])
        elif how == 4:  # another value of the document, where it does not belong
            other, at = rng.choice(choices)
            container[key] = copy.deepcopy(other[at])
        elif how == 5 and type(container[key]) in (int, float) and abs(container[key]) < 1e15:
            container[key] = rng.choice((container[key] + 1, -container[key], container[key] * 2, container[key] + 0.5))
        else:
            container[key] = copy.deepcopy(rng.choice(STRANGE))
    text = dump(seal(document))
    return text[: rng.randrange(len(text))] if rng.random() < 0.05 else text


def sealed(separators):
    """Puts the checksum right, as whoever rewrote a document would."""

    def seal(document):
        content = {key: value for key, value in document.items() if key != "sha256"}
        try:
            plain = json.loads(dump(content))
            text = json.dumps(plain, sort_keys=True, separators=separators)
        except (ValueError, RecursionError):
            return document
        return {"sha256": hashlib.sha256(text.encode()).hexdigest(), **content}

    return seal


def as_it_is(document):
    return document


# ---- documents ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """A document of a file, and what reads it."""

    file: Path
    read: Callable[[], object]
    seal: Callable[[dict], dict] = as_it_is
    behind: str = ""  # what follows the document in its file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with one of everything."""
    root = tmp_path_factory.mktemp("documents")
    params = jax.tree.map(np.float32, reference.random_params(CFG, np.random.default_rng(0), 1.0))
    start = order.Position(checksum="c", name="a", seed=0, total=9, next=4, open=(((1, 2),),), first=(3,))
    entry = {"stage": "a", "kind": "train", "mask": None, "data": {"positions": {"a": start.to_json()}}}
    work = root / "work"
    for step in (5, 7):
        checkpoint.save(
            work / "a" / "checkpoints" / str(step), CFG, params, step=step, provenance=[entry], data_state=b"{}"
        )
    source = work / "a" / "checkpoints" / "7"
    plan = growth.plan(CFG, LARGER)
    growth.stream(plan, source, root / "grown", memory_gb=0.2, provenance={"stage": "g", "mask": None})
    growth.stream(plan, source, root / "half" / "grown", memory_gb=0.2, shard=(0, 2))
    old, new = checkpoint.open_lazy(source), checkpoint.open_lazy(root / "grown")
    result = growth.verify_stored(plan, old, new)
    receipt = receipts.receipt(plan, result, GrowStage(kind="grow", model={}), [0.5])
    receipt |= {"source": receipts.fingerprints(old), "destination": receipts.fingerprints(new)}
    files.write_json(root / "grown" / "growth_receipt.json", receipt)
    files.write_json(root / "grown" / "plan.json", plan.to_json())
    data = {"tokenizer": "t.model", "sources": {"en": {"files": ["a.jsonl"], "rate": 1.0}}}
    stage = {"kind": "pretrain", "model": to_dict(CFG), "data": data, "seq_len": 4, "batch_size": 2, "steps": 3}
    stage |= {"schedule": {"warmup": 1}, "optimizer": {"learning_rate": 0.1}}
    page = workdir.as_json(run_config({"run": ["a", "g"], "a": stage, "g": {"kind": "grow", "model": {"mlp_dim": 4}}}))
    files.write_json(work / "config.json", page)
    files.write_json(work / "a" / "changes.json", {"changes": [{"from": 5, "config": {"a.steps": [1, 2]}}]})
    summary = {"stage": "a", "kind": "pretrain", "parameters": 9, "tokens": 7, "flops": 1e3}
    summary |= {"bits_per_byte_before": {"en": 3.0}, "bits_per_byte_after": {"en": 2.0}}
    files.write_json(work / "a" / "summary.json", summary | {"receipt": {"max_abs": 0.5, "policy": "exact"}})
    (work / "a" / "metrics").mkdir()
    (work / "a" / "metrics" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens": 8, "eval/en": null}\n')
    (root / "state").write_text(json.dumps({"batches": 3, "seq_len": 8, "positions": {"a": start.to_json()}}))
    (root / "tokenizer.model").write_bytes(tokenizer_bytes())
    prose = caches.write_lines(root / "prose.jsonl", [{"text": text} for text in TEXTS])
    made = caches.config(root / "tokenizer.model", {"prose": (prose, "jsonl", 1)})
    caches.make(made, root / "cache")
    unit = shards.plan(made)[0]
    (root / "begun" / "prose").mkdir(parents=True)
    done = shards.write_unit(unit, made, load_vocabulary(root / "tokenizer.model"), root / "begun")
    assert done == shards.finished(root / "begun", unit)
    caching._begun(root / "begun", made, load_vocabulary(root / "tokenizer.model"), [unit])
    fetched = {"format": 1, "name": "stdlib", "missing": [], "domains": {"en": {"files": {"a": {"sha256": "x"}}}}}
    (root / "fetched").mkdir()
    (root / "fetched" / "manifest.json").write_text(json.dumps(fetched))
    (root / "program").mkdir()
    program = {"fits": True, "needed_bytes": 1, "usable_bytes": 2, "held": {"parameters": 1}, "host_bytes": 0}
    program |= {"allocated_temporary_bytes": 1, "device_order": [[0, 0, 0, 0, 0]], "compile_seconds": 1.5}
    (root / "program" / "program.json").write_text(json.dumps(program))
    (root / "dialogue").write_text(json.dumps(caches.talk("What?", "That.", "And?", "This.")))
    (root / "text").write_text(json.dumps({"text": "a text"}))
    convert.save_hf(root / "hf", CFG, params, format="llama", dtype="float32")
    return root


def work_config(place):
    names = checkpoint.locate.find_step(place / "work")
    workdir.require_own(place / "work", None)
    return names


def opened(place):
    lazy = checkpoint.open_lazy(place / "work" / "a" / "checkpoints" / "7")
    require_unmasked(lazy.provenance, "here")
    order.positions_in(lazy.provenance)
    inspect.describe(inspect.figures(lazy))
    for array in lazy.items["params"].values():
        assert array.path.parent.parent == lazy.path, "a leaf never leads outside of its checkpoint"
        array.read()


KINDS = {
    "meta": lambda p: Kind(p / "work/a/checkpoints/7/meta/meta.json", lambda: opened(p), sealed((",", ":"))),
    "zarr": lambda p: Kind(p / "work/a/checkpoints/7/params/layers.mlp.up/zarr.json", lambda: opened(p)),
    "work config": lambda p: Kind(p / "work/config.json", lambda: work_config(p)),
    "stored run": lambda p: Kind(p / "work/config.json", lambda: workdir._stored_config(p / "work/config.json")),
    "changes": lambda p: Kind(p / "work/a/changes.json", lambda: workdir.read_changes(p / "work/a")),
    "summary": lambda p: Kind(p / "work/a/summary.json", lambda: report.table([workdir.read_summary(p / "work/a")])),
    "receipt": lambda p: Kind(p / "grown/growth_receipt.json", lambda: rechecked(p)),
    "plan": lambda p: Kind(p / "grown/plan.json", lambda: read_plan(p)),
    "metrics": lambda p: Kind(
        p / "work/a/metrics/metrics.jsonl", lambda: metrics.read(p / "work/a/metrics/metrics.jsonl"), behind="\n{}\n"
    ),
    "header": lambda p: Kind(p / "half/grown.partial/header.json", lambda: streamed(p)),
    "cache manifest": lambda p: Kind(
        p / "cache/manifest.json", lambda: cache.RowCache(p / "cache").close(), sealed((", ", ": "))
    ),
    "cache plan": lambda p: Kind(p / "begun/plan.json", lambda: caching._read_plan(p / "begun")),
    "shard account": lambda p: Kind(
        p / "begun" / shards.ACCOUNTS / "prose/00000.json", lambda: shards.finished(p / "begun", unit_of(p))
    ),
    "position": lambda p: Kind(p / "state", lambda: order.parse_state((p / "state").read_bytes())),
    "fetched": lambda p: Kind(p / "fetched/manifest.json", lambda: corpora.read_manifest(p / "fetched")),
    "program": lambda p: Kind(p / "program/program.json", lambda: compiling._read(p / "program")),
    "dialogue": lambda p: Kind(
        p / "dialogue", lambda: documents.check_record((p / "dialogue").read_text(), "dialogues")
    ),
    "text": lambda p: Kind(p / "text", lambda: documents.check_record((p / "text").read_text(), "jsonl")),
    "release config": lambda p: Kind(p / "hf/config.json", lambda: open_release(p / "hf")),
    "generation config": lambda p: Kind(
        written(p / "hf/generation_config.json", GENERATION), lambda: open_release(p / "hf")
    ),
    "tensor header": lambda p: Kind(TensorHeader(p / "hf/model.safetensors"), lambda: open_release(p / "hf")),
    "tensor index": lambda p: Kind(tensor_index(p), lambda: open_release(p / "indexed")),
    "json tokenizer": lambda p: Kind(
        written(p / "tokenizer.json", byte_level(TEXTS, 300)), lambda: load_vocabulary(p / "tokenizer.json")
    ),
}
GENERATION = {
    **{"do_sample": False, "repetition_penalty": 1.03, "temperature": 0.3, "top_k": 5, "top_p": 0.85},
    **{"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 3, "max_new_tokens": 100},
}


def written(path, document):
    path.write_text(json.dumps(document))
    return path


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """The JSON at the head of a safetensors file, read and written as a file of its own."""

    file: Path

    def _parts(self):
        data = self.file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return data[8:end], data[end:]

    def read_bytes(self):
        return self._parts()[0]

    def write_bytes(self, header):
        # What follows is found by the length of the header, whatever that holds.
        self.file.write_bytes(len(header).to_bytes(8, "little") + header + self._parts()[1])


def tensor_index(place):
    """A release whose one file of weights has an index."""
    copy_of = shutil.copytree(place / "hf", place / "indexed", dirs_exist_ok=True)
    (copy_of / "generation_config.json").unlink(missing_ok=True)
    weights = (copy_of / "model.safetensors").rename(copy_of / "model-00001-of-00001.safetensors")
    names = [name for name in json.loads(TensorHeader(weights).read_bytes()) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, weights.name)}
    return written(copy_of / "model.safetensors.index.json", index)


def unit_of(place):
    made = caches.config(place / "tokenizer.model", {"prose": (str(place / "prose.jsonl"), "jsonl", 1)})
    return shards.plan(made)[0]


def rechecked(place):
    receipt = receipts.require_receipt(
        place / "grown", checkpoint.open_lazy(place / "work/a/checkpoints/7"), checkpoint.open_lazy(place / "grown")
    )
    return report.table([{"stage": "g", "kind": "grow", "parameters": 1}]), receipt


def read_plan(place):
    plan = receipts.read_plan(place / "grown")
    return str(plan), plan.digest, plan.dst_spec


def streamed(place):
    source = place / "work/a/checkpoints/7"
    return growth.stream(growth.plan(CFG, LARGER), source, place / "half/grown", memory_gb=0.2, shard=(0, 2))


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_document_is_read_or_refused_in_one_line(place, name):
    kind = KINDS[name](place)
    original = kind.file.read_bytes()
    document = json.loads(original)
    kind.read()  # as it is, it is read

    @settings(max_examples=EXAMPLES // 25)
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = random.Random(seed)
        for _ in range(25):
            text = mutated(document, rng, kind.seal)
            kind.file.write_bytes((text + kind.behind).encode("utf-8", "surrogatepass"))
            try:
                kind.read()
            except (UserError, DamageError) as error:
                assert "\n" not in str(error) or ";\n" in str(error), str(error)
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error} for {text[:2000]}") from error

    try:
        check()
    finally:
        kind.file.write_bytes(original)

"""A user's own seqio Tasks, registered in a module that a page imports, feed training: live, and through a cache.

Texts, ids and masks are compared with the SentencePiece library's own encoding of the lines.
"""

import hashlib
import json
import random
import shutil
import sys

import numpy as np
import pytest

from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.data import cache, caching, domains
from tele_jax.errors import UserError
from tele_jax.settings import CacheConfig, DataConfig, SourceConfig
from tests.data import caches

seqio = pytest.importorskip("seqio", reason="seqio is not installed: pip install 'tele_jax[data]'")
pytestmark = pytest.mark.usefixtures("quick_compilation")

# What a user of seqio writes: text files, standard preprocessors, seqio's vocabulary or the project's.
MODULE = """
from pathlib import Path
import seqio
import tensorflow as tf
from tele_jax.data.vocabulary import load_vocabulary

HERE = Path(__file__).parent
THEIRS = seqio.SentencePieceVocabulary(str(HERE / "tokenizer.model"))
OURS = load_vocabulary(HERE / "tokenizer.model")

def question(line):
    parts = tf.strings.split(line, " = ")
    return {"inputs": parts[0], "targets": parts[1]}

def document(line):
    return {"targets": line}

def task(name, make, vocabulary, **features):
    seqio.TaskRegistry.add(
        "USER_" + name,
        seqio.TextLineDataSource({"train": str(HERE / "lines-*.txt"), "held": str(HERE / "held.txt"),
                                  "none": str(HERE / "nothing.txt")}),
        preprocessors=[
            lambda ds: ds.map(make), seqio.preprocessors.tokenize, seqio.preprocessors.append_eos,
        ],
        output_features={name: seqio.Feature(vocabulary, add_eos=eos) for name, eos in features.items()},
    )

task("lm", document, THEIRS, targets=True)
task("bare", document, OURS, targets=False)
task("ends", document, OURS, targets=True)
task("qa", question, OURS, inputs=False, targets=True)
task("only_inputs", question, OURS, inputs=True)
task("pass", document, seqio.ByteVocabulary(), targets=True)
seqio.TaskRegistry.add(
    "USER_ids",
    seqio.FunctionDataSource(lambda split, shuffle_files: tf.data.Dataset.range(5), splits=["train"]),
    preprocessors=[lambda ds: ds.map(lambda i: {"targets": tf.cast(tf.stack([7, i * 400]), tf.int32)})],
    output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(1000), add_eos=False)},
)
seqio.TaskRegistry.add(
    "USER_float",
    seqio.FunctionDataSource(lambda split, shuffle_files: tf.data.Dataset.range(5), splits=["train"]),
    preprocessors=[lambda ds: ds.map(lambda i: {"targets": tf.cast(tf.stack([i]), tf.float32)})],
    output_features={"targets": seqio.ContinuousFeature(dtype=tf.float32)},
)
seqio.MixtureRegistry.add("USER_mixture", [("USER_lm", 1.0), ("USER_bare", 3.0)])
seqio.MixtureRegistry.add("USER_ours", [("USER_ends", 1.0), ("USER_bare", 3.0)])
"""
PAGE = """
from pathlib import Path
from ml_collections import ConfigDict
import USER_tasks

HERE = Path(__file__).parent

def get_config(cached=""):
    model = dict(num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=1000, max_seq_len=64)
    model |= dict(dtype="float32", remat="none", mup_base_width=8)
    def stage(kind, task, **fields):
        data = dict(tokenizer=str(HERE / "tokenizer.model"))
        if cached:
            data |= dict(cache=str(HERE / ("rows_" + task)))
        else:
            data |= dict(sources=dict(own=dict(task="USER_" + task, validation_split="held")))
        shape = dict(steps=6, batch_size=4, seq_len=32, log_every=1, checkpoint_every=2, keep_checkpoints=10)
        return dict(kind=kind, data=data, optimizer=dict(learning_rate=1e-3)) | shape | fields
    stages = dict(pre=stage("pretrain", "mixture", model=model), sft=stage("sft", "qa"))
    return ConfigDict(dict(run=("pre", "sft"), **stages))
"""
ROWS = """
from pathlib import Path
from ml_collections import ConfigDict
import USER_tasks

def get_config(task, kind="pretrain"):
    data = dict(tokenizer=str(Path(__file__).parent / "tokenizer.model"), sources=dict(own=dict(task="USER_" + task)))
    return ConfigDict(dict(data=data, kind=kind, seq_len=32))
"""


@pytest.fixture(scope="module")
def place(model_file, tmp_path_factory):
    """A directory with pages, a module of Tasks, and three files of lines "question = answer"."""
    directory = tmp_path_factory.mktemp("user")
    shutil.copyfile(model_file, directory / "tokenizer.model")
    rng = random.Random(3)
    lines = [
        f"{a} and {b} {'and 0 ' * (a % 7)}= {a + b}" for a, b in (rng.choices(range(1000), k=2) for _ in range(45))
    ]
    for i in range(3):
        (directory / f"lines-{i}.txt").write_text("\n".join(lines[15 * i : 15 * i + 15]))
    (directory / "held.txt").write_text("1 and 2 = 3\n20 and 30 = 50")
    (directory / "nothing.txt").write_text("")
    user = "user" + hashlib.sha256(str(directory).encode()).hexdigest()[:8]
    for name, text in (
        (f"{user}_tasks.py", MODULE),
        ("page.py", PAGE),
        ("rows.py", ROWS.replace(", kind)", ', kind="pretrain")')),
    ):
        (directory / name).write_text(text.replace("USER", user))
    sys.path.insert(0, str(directory))
    __import__(f"{user}_tasks")
    sys.path.remove(str(directory))
    yield directory, user, lines
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for name in [name for name in registry.names() if name.startswith(user)]:
            registry.remove(name)


def data_of(place, task, **fields):
    directory, user, _ = place
    source = SourceConfig(task=f"{user}_{task}", **fields)
    return DataConfig(tokenizer=str(directory / "tokenizer.model"), sources={"own": source})


def config_of(place, task, kind="pretrain", **fields):
    return CacheConfig(data=data_of(place, task, **fields), kind=kind, seq_len=32)


def epoch_of(batch, weights_too=False):
    """The segments of rows, as tuples of targets, or of (target, weight)."""
    parts = []
    for segment in caches.segments(batch):
        column = segment["targets"].tolist()
        weights = segment["loss_weights"].tolist()
        parts.append(tuple(zip(column, weights)) if weights_too else tuple(column))
    return parts


def live_documents(data, count, kind="pretrain"):
    with_feed = caches.open_feed(data, kind=kind, seq_len=256, batch_size=8, seed=0)
    try:
        batches = [next(with_feed) for _ in range(count)]
    finally:
        with_feed.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("task", ["lm", "bare"])
def test_a_task_of_targets_is_learned_whole_whoever_made_its_vocabulary(place, vocabulary, task):
    """Its end-of-sequence token is added where the task gives none, and never twice."""
    batch = live_documents(data_of(place, task), 4)
    eos = vocabulary.eos_id
    expected = {(*vocabulary.tokenizer.encode(line), eos) for line in place[2]}
    whole = [part for part in epoch_of(batch) if part[-1] == eos and part in expected]
    assert set(whole) == expected
    assert len(epoch_of(batch)) - len(whole) <= 2 * 32, "nothing but what the ends of rows cut"
    assert batch["loss_weights"].all()
    assert all(segment["tokens"][0] == eos for segment in caches.segments(batch))


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_of_inputs_and_targets_the_targets_are_learned(place, vocabulary, kind):
    batch = live_documents(data_of(place, "qa"), 4, kind)
    expected = set()
    for line in place[2]:
        asked, answer = (vocabulary.tokenizer.encode(part) for part in line.split(" = "))
        answer.append(vocabulary.eos_id)
        expected.add((*((i, 0) for i in asked), *((i, 1) for i in answer)))
    found = set(epoch_of(batch, weights_too=True))
    assert expected <= found
    if kind == "sft":
        assert found == expected, "whole examples alone"


def test_an_example_that_is_longer_than_a_row_is_counted_in_fine_tuning(place, vocabulary):
    longer = [line for line in place[2] if len(vocabulary.encode(line.replace(" = ", ""))) + 1 > 24]
    given = []
    opened = caches.open_feed(
        data_of(place, "qa"), kind="sft", seq_len=24, batch_size=4, seed=0, on_rejects=given.append
    )
    opened.close()
    (account,) = given
    assert account.num_rejected == len(account.rejected) > 0 and abs(len(longer) - account.num_rejected) < 10
    assert len(account) == 45 - account.num_rejected
    assert f"sources.own.task: {account.num_rejected} of 45 documents cannot be used" in account.account()
    assert "tokens, more than a row of 24" in account.rejected[0]["reason"]


def test_held_out_text_of_a_task_is_counted_in_bytes(place):
    held = caches.held_out(data_of(place, "qa", validation_split="held"), kind="sft", seq_len=32, batch_size=4)["own"]
    assert held.num_bytes == len("3") + len("50")
    held = caches.held_out(data_of(place, "lm", validation_split="held"), kind="pretrain", seq_len=32, batch_size=4)[
        "own"
    ]
    assert held.num_bytes == len("1 and 2 = 3") + len("20 and 30 = 50")


def test_a_mixture_becomes_a_domain_for_each_of_its_tasks(place):
    _, user, _ = place
    resolved = domains.resolve(data_of(place, "mixture", rate=8))
    rates = {name: (source.task, source.rate) for name, source in resolved.sources.items()}
    assert rates == {f"own.{user}_lm": (f"{user}_lm", 2.0), f"own.{user}_bare": (f"{user}_bare", 6.0)}


def test_our_vocabulary_serves_any_number_of_datasets_of_a_process(place, vocabulary):
    first = vocabulary.tokenizer.encode(place[2][0])
    for _ in range(3):
        for name in ("bare", "ours"):
            dataset = seqio.get_mixture_or_task(f"{place[1]}_{name}").get_dataset(None, "train", shuffle=False)
            assert len([example["targets"] for example in dataset.take(9).as_numpy_iterator()]) == 9
        dataset = seqio.get_mixture_or_task(f"{place[1]}_bare").get_dataset(None, "train", shuffle=False)
        assert next(dataset.as_numpy_iterator())["targets"].tolist() == first


@pytest.mark.parametrize(
    ("task", "kind", "fields", "expected"),
    [
        ("ln", "pretrain", {}, r"sources\.own\.task: seqio has no task 'user\w+_ln'; did you mean 'user\w+_lm'\?"),
        ("lm", "sft", {}, "fine-tuning learns answers, so it needs the features inputs and targets, not targets alone"),
        (
            "lm",
            "pretrain",
            {"split": "test"},
            r"sources\.own\.task: user\w+_lm has no split 'test'; it has held, none, train",
        ),
        ("lm", "pretrain", {"split": "none"}, "the split 'none' of the task user.*_lm has no example"),
        ("only_inputs", "pretrain", {}, "its features are inputs; they have to be targets, or inputs and targets"),
        ("float", "pretrain", {}, "its feature targets is float32 of rank 1, not token ids in a row"),
        ("ids", "pretrain", {}, r"targets of example 3 has ids from 7 to 1200, and the tokenizer .* from 0 to 999"),
        ("pass", "pretrain", {}, r"the vocabulary of targets is not the tokenizer .*: the id \d+ is '.*', and in the"),
    ],
)
def test_a_task_that_cannot_be_trained_on_is_refused_by_name(place, task, kind, fields, expected):
    with pytest.raises(UserError, match=expected) as caught:
        domains.check(data_of(place, task, **fields), kind=kind, seq_len=32)
    assert "\n" not in str(caught.value)


def test_files_and_a_task_are_one_too_many():
    with pytest.raises(UserError, match="files and task: a domain is read from one of the two"):
        SourceConfig(files=("x",), task="y")


# ----------------------------------------------------------------------------------------------------- the command


def cached(place, task, kind, out, *flags):
    page = f"{place[0] / 'rows.py'}:{task}"
    return main(["data", "cache", "--config", page, "--out", str(out), *flags, f"--config.kind={kind}"])


@pytest.fixture(scope="module")
def rows(place):
    for task, kind in (("mixture", "pretrain"), ("qa", "sft")):
        assert cached(place, task, kind, place[0] / f"rows_{task}", "--runner", "serial") == 0
    return place[0]


def content(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def test_workers_that_know_no_task_load_the_page_and_give_the_same_bytes(place, rows, tmp_path):
    pytest.importorskip("apache_beam", reason="Beam is not installed: pip install 'tele_jax[beam]'")
    assert cached(place, "mixture", "pretrain", tmp_path / "beam", "--workers", "2") == 0
    assert content(tmp_path / "beam") == content(rows / "rows_mixture")


def test_a_cache_holds_the_examples_of_a_task_by_the_shards_of_its_source(place, rows, vocabulary):
    opened = cache.RowCache(rows / "rows_mixture")
    name = f"own.{place[1]}_lm"
    domain = opened.manifest.domains[name]
    assert (domain.source.task, domain.source.split, len(domain.shards)) == (f"{place[1]}_lm", "train", 3)
    assert domain.counts.documents == 45 and domain.counts.text_bytes == sum(map(len, place[2]))
    found = caches.documents(caches.whole_domain(opened, name), vocabulary.eos_id)
    expected = [[*vocabulary.tokenizer.encode(line), vocabulary.eos_id] for line in place[2]]
    assert sorted(found) == sorted(expected)


def test_a_build_that_goes_on_makes_the_shards_of_a_task_again_that_gives_something_else(place, tmp_path, monkeypatch):
    made = config_of(place, "lm")
    monkeypatch.setattr(caching, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        caches.make(made, tmp_path / "rows")
    monkeypatch.undo()
    task = seqio.TaskRegistry.get(f"{place[1]}_lm")
    other = task.replace(preprocessors=[*task.preprocessors, lambda ds: ds.take(9)])
    seqio.TaskRegistry.remove(task.name)
    seqio.TaskRegistry.add_provider(task.name, other)
    said = []
    caching.make(made, tmp_path / "rows", runner="serial", say=said.append)
    caches.make(made, tmp_path / "undisturbed")
    seqio.TaskRegistry.remove(task.name)
    seqio.TaskRegistry.add_provider(task.name, task)
    assert "3 finished shards were made again: their tasks give other examples" in said[-1]
    assert content(tmp_path / "rows") == content(tmp_path / "undisturbed")
    assert cache.read_manifest(tmp_path / "rows").domains["own"].counts.documents == 27


def train(place, workdir, which):
    return main(["train", "--config", f"{place[0] / 'page.py'}{which}", "--workdir", str(workdir)])


@pytest.mark.parametrize("which", ["", ":cached"], ids=["live", "cached"])
def test_a_run_on_tasks_that_is_killed_ends_with_the_same_parameters(place, rows, tmp_path, which, capsys):
    assert train(place, tmp_path / "whole", which) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    # As a kill after step 3 leaves it.
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"killed/sft/checkpoints/{step}")
    (tmp_path / "killed/sft/summary.json").unlink()
    assert train(place, tmp_path / "killed", which) == 0
    ours, theirs = (checkpoint.load(tmp_path / name) for name in ("killed", "whole"))
    assert ours.data_state == theirs.data_state
    for name, value in flatten(theirs.params).items():
        np.testing.assert_array_equal(np.asarray(flatten(ours.params)[name]), np.asarray(value), err_msg=name)
    summaries = [json.loads((tmp_path / f"whole/{stage}/summary.json").read_text()) for stage in ("pre", "sft")]
    if not which:
        assert set(summaries[0]["bits_per_byte_after"]) == {f"own.{place[1]}_lm", f"own.{place[1]}_bare"}
        assert set(summaries[1]["bits_per_byte_after"]) == {"own"}


def test_the_command_says_in_one_line_which_task_is_missing(place, tmp_path, capsys):
    flags = [f"--config.data.sources.own.task={place[1]}_nothing_like_it"]
    page = f"{place[0] / 'rows.py'}:lm"
    assert main(["data", "cache", "--config", page, "--out", str(tmp_path / "rows"), *flags]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

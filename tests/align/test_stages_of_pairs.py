"""Reward models and DPO as stages: against torch, over devices, killed and resumed, with adapters, and bad pages."""

import json
import math
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, stages
from tele_jax.align import pairs, reference, scoring
from tele_jax.aot.jobs import TrainJob
from tele_jax.aot.topology import find_slice
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.data import sources
from tele_jax.data.record_rows import RecordBatches
from tele_jax.data.surroundings import Surroundings
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh
from tele_jax.stages import find_kind, read_stage
from tele_jax.train import metrics
from tele_jax.train import workdir as owned
from tests.data.caches import write_lines
from tests.data.test_record_rows import answer_of
from tests.inference.test_chat import tokenizer_bytes
from tests.reference import forward as forward_in_float64

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
MODEL |= {"vocab_size": 600, "dtype": "float32", "max_seq_len": 64}
LORA = {"rank": 4, "alpha": 6.0, "targets": ("attn", "mlp")}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


def record(i):
    chosen, rejected = NUMBERS[i % 8], f"it is {NUMBERS[(i + 3) % 8]}"
    return {
        "prompt": f"What is {i % 8}?" + " Say it." * (i % 3),
        "chosen": chosen,
        "rejected": rejected,
        "margin": i % 2,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pairs, a ranking among them, dialogues, a tokenizer, and two models that nobody trained."""
    directory = tmp_path_factory.mktemp("pairs")
    ranking = {"prompt": "Which is best?", "answers": ["this", "that", "nothing at all"]}
    write_lines(directory / "pairs.jsonl", [*map(record, range(21)), {**record(0), "rejected": "zero"}, ranking])
    write_lines(directory / "held_out.jsonl", [{**record(i), "prompt": f"And {i}?"} for i in range(6)])
    write_lines(directory / "talk.jsonl", [{"instruction": f"Say {n}.", "output": n} for n in NUMBERS])
    (directory / "tokenizer.model").write_bytes(tokenizer_bytes())
    cfg = tele.ModelConfig(**MODEL)
    for name, seed in (("base", 1), ("other", 2)):
        params = jax.tree.map(lambda leaf: 3 * leaf, tele.init(cfg, jax.random.key(seed)))
        checkpoint.save(directory / name, cfg, params)
    return directory


def stage(place, kind, **fields):
    source = {"files": [str(place / "pairs.jsonl")], "format": "pairs"}
    source |= {"validation_files": [str(place / "held_out.jsonl")]}
    data = {"tokenizer": str(place / "tokenizer.model"), "sources": {"numbers": source}}
    shape = {"steps": 4, "batch_size": 8, "seq_len": 64, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 9}
    return {"kind": kind, "data": data, "optimizer": {"learning_rate": 1e-3}, **shape, **fields}


def page(place, kind, **fields):
    return {"run": ["own"], "start": str(place / "base"), "own": stage(place, kind, **fields)}


def lines(workdir, stage="own"):
    return [line for line in metrics.read(workdir / stage / "metrics" / "metrics.jsonl") if "loss" in line]


REWARD = {"centre": 0.3, "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1}}
DPO = {"sft_weight": 0.2, "loss": "conservative", "label_smoothing": 0.1, "length_normalised": True, "beta": 0.7}


@pytest.fixture(scope="module")
def finished(place):
    """Work directories of both kinds, on one device, undisturbed."""
    done = {}
    for kind, fields in (("reward", REWARD), ("dpo", DPO | {"reference": str(place / "other")})):
        done[kind] = place / kind
        tele.run(page(place, kind, **fields), done[kind])
    return done


@pytest.fixture(scope="module")
def torch_models(place, tmp_path_factory):
    """The two models in transformers, by name."""
    pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'tele_jax[hf]'")
    found = {}
    for name in ("base", "other"):
        loaded, out = checkpoint.load(place / name), tmp_path_factory.mktemp("llama") / name
        tele.convert.save_hf(out, loaded.cfg, loaded.params, format="llama")
        found[name] = transformers.AutoModelForCausalLM.from_pretrained(out).train()
    return found


def first_batch(place, kind, **fields):
    made = read_stage(stage(place, kind, **fields), "config.own")
    feed = RecordBatches(made, "pairs", sources.Indexes()).feed()
    batch = next(feed)
    feed.close()
    return batch


def of_answers(batch, compute):
    """compute(ids, the places in them of the tokens of the answer) of every sequence, alone and without padding."""
    import torch

    rows = []
    for row in range(len(batch["margin"])):
        for side in (0, 1):
            own = answer_of(batch, row, side)
            rows.append(compute(torch.from_numpy(own["tokens"]).long(), 1 + np.flatnonzero(own["loss_weights"])))
    return torch.stack(rows).reshape(-1, 2)


def norm(model, *others):
    import torch

    gradients = [p.grad for p in [*model.parameters(), *others] if p.grad is not None]
    return float(torch.sqrt(sum((g**2).sum() for g in gradients)))


def test_the_first_step_of_a_reward_model_is_that_of_torch(place, finished, torch_models):
    """Each answer alone, without padding, scored by a linear layer on the last hidden state, as transformers does."""
    import torch

    batch, model = first_batch(place, "reward"), torch_models["base"]
    head = checkpoint.load(finished["reward"] / "own" / "checkpoints" / "2").params["scalar_head"]["kernel"]
    assert head.shape == (16, 1)
    fresh = tele.init(tele.ModelConfig(**MODEL, scalar_head=True), jax.random.key(0))["scalar_head"]["kernel"]
    kernel = torch.tensor(np.asarray(fresh), requires_grad=True)
    scores = of_answers(batch, lambda ids, _: (model.model(ids[None]).last_hidden_state[0, -1] @ kernel)[0])
    weights, margin = torch.from_numpy(batch["pair_weights"]), torch.from_numpy(batch["margin"])
    losses = torch.nn.functional.softplus(-(scores[:, 0] - scores[:, 1] - margin)) + 0.3 * scores.sum(dim=1) ** 2
    loss = (losses * weights).sum() / weights.sum()
    model.zero_grad()
    loss.backward()
    line = lines(finished["reward"])[0]
    np.testing.assert_allclose([line["loss"], line["grad_norm"]], [loss.item(), norm(model, kernel)], rtol=1e-5)
    right = ((scores[:, 0] > scores[:, 1]) * weights).sum() / weights.sum()
    assert line["accuracy"] == pytest.approx(right.item()) and not (weights == 1).all(), "a ranking is in the batch"
    assert line["chosen_reward"] == pytest.approx(((scores[:, 0] * weights).sum() / weights.sum()).item(), abs=1e-5)


def test_the_first_step_of_dpo_is_that_of_torch(place, finished, torch_models):
    import torch

    batch = first_batch(place, "dpo")

    def logp(model):
        def of(ids, places):
            every = model(ids[None]).logits[0].log_softmax(-1)
            return every[places - 1, ids[places]].sum()

        return of_answers(batch, of)

    model, beta, lengths = torch_models["base"], 0.7, torch.from_numpy(batch["answer_lengths"])
    policy = logp(model)
    rewards = beta * (policy - logp(torch_models["other"]).detach()) / lengths
    z, weights = rewards[:, 0] - rewards[:, 1], torch.from_numpy(batch["pair_weights"])
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z) - 0.2 * policy[:, 0] / lengths[:, 0]
    loss = (losses * weights).sum() / weights.sum()
    model.zero_grad()
    loss.backward()
    line = lines(finished["dpo"])[0]
    np.testing.assert_allclose([line["loss"], line["grad_norm"]], [loss.item(), norm(model)], rtol=1e-5)
    mean = lambda values: ((values * weights).sum() / weights.sum()).item()  # noqa: E731
    names = ("margin", "chosen_reward", "rejected_reward", "chosen_length", "rejected_length")
    wanted = [mean(values) for values in (z, rewards[:, 0], rewards[:, 1], lengths[:, 0], lengths[:, 1])]
    np.testing.assert_allclose([line[name] for name in names], wanted, rtol=1e-4, atol=1e-5)


def test_the_evaluation_scores_held_out_pairs(place, finished):
    """Scores of the saved model, pair by pair, against the figures of the last evaluation."""
    for kind, workdir in finished.items():
        (rejected,) = (workdir / "own" / "rejected" / "numbers.files.jsonl").read_text().splitlines()
        assert json.loads(rejected)["line"] == 22 and "same tokens" in json.loads(rejected)["reason"]
        last = metrics.read(workdir / "own" / "metrics" / "metrics.jsonl")[-1]
        found = {name: value for name, value in last.items() if name.endswith("/numbers")}
        assert sorted(found) == ["eval/accuracy/numbers", "eval/margin/numbers"], last
        if kind == "reward":
            made = read_stage(stage(place, kind), "config.own")
            (held,) = RecordBatches(made, "pairs", sources.Indexes()).held_out.values()
            loaded, margins = checkpoint.load(workdir), []
            for batch in held.batches:
                for i in np.flatnonzero(batch["pair_weights"]):
                    alone = [answer_of(batch, i, side)["tokens"] for side in (0, 1)]
                    rows = [scores_of(ids, 0, len(ids)) for ids in alone]
                    chosen, rejected = (pairs.compiled_scores(loaded.cfg, loaded.params, row) for row in rows)
                    margins.append(float(chosen[0]) - float(rejected[0]))
            assert len(margins) == 6
            assert found["eval/margin/numbers"] == pytest.approx(np.mean(margins), abs=1e-5)
            assert found["eval/accuracy/numbers"] == np.mean(np.array(margins) > 0)
    assert [float(pairs.right(x)) for x in (-2.0, 0.0, 3.0)] == [0, 0.5, 1]


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_eight_devices_and_microbatches_train_as_one_device(place, finished, kind):
    fields = REWARD if kind == "reward" else DPO | {"reference": str(place / "other")}
    to = place / f"{kind}8"
    tele.run(page(place, kind, **fields, microbatches=2) | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, to)
    ours, theirs = lines(to), lines(finished[kind])
    for name in ("loss", "grad_norm", "margin", "accuracy"):
        found, wanted = ([line[name] for line in each] for each in (ours, theirs))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


KILLED = """
import json, os, signal, sys
import tele_jax as tele
from tele_jax.train.trainer import Trainer

save = Trainer._save
def and_die(self, step, checkpoints):
    save(self, step, checkpoints)
    checkpoints.wait()
    os.kill(os.getpid(), signal.SIGKILL)

Trainer._save = and_die
page, workdir = sys.argv[1:]
tele.run(json.loads(page), workdir)
"""


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_killed_stage_goes_on_to_the_same_bits(place, finished, kind, capsys):
    fields = REWARD if kind == "reward" else DPO | {"reference": str(place / "other")}
    own, workdir = page(place, kind, **fields), place / f"{kind}_killed"
    command = [sys.executable, "-c", KILLED, json.dumps(own), str(workdir)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert checkpoint.open_lazy(workdir).step == 2
    tele.run(own, workdir)
    said = capsys.readouterr().out
    assert "goes on at step 2 of 4" in said and "computes the log-probabilities" not in said
    mine, theirs = (checkpoint.load(w) for w in (workdir, finished[kind]))
    assert mine.data_state == theirs.data_state
    for name in ("params", "opt_state"):
        found, wanted = flatten(getattr(mine, name)), flatten(getattr(theirs, name))
        for leaf in wanted:
            assert np.asarray(found[leaf]).tobytes() == np.asarray(wanted[leaf]).tobytes(), leaf


def test_the_rows_of_a_run_change_freely(place, finished, tmp_path):
    workdir = shutil.copytree(finished["dpo"], tmp_path / "w")
    fewer = page(place, "dpo", **DPO, reference=str(place / "other"), rows=2)
    owned.claim(stages.run_config(fewer), workdir, None, print)
    assert owned.read_changes(workdir / "own") == []


def test_adapters_are_compared_with_the_model_without_them(place):
    """After fine-tuning with adapters, the reference is the merged model, and no step moves what is frozen."""
    talk = {"files": [str(place / "talk.jsonl")], "format": "alpaca"}
    data = {"tokenizer": str(place / "tokenizer.model"), "sources": {"talk": talk}}
    tuned = stage(place, "sft", data=data, lora=LORA, steps=3, optimizer={"learning_rate": 5e-2})
    aligned = stage(place, "dpo", lora=LORA | {"targets": ("q",)}, optimizer={"learning_rate": 1e-2})
    own = {"run": ["sft", "dpo"], "start": str(place / "base"), "sft": tuned, "dpo": aligned}
    tele.run(own, place / "adapted")
    first, *_, last = lines(place / "adapted", "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-6) and first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < math.log(2) - 1e-4 and first["grad_norm"] > 0
    # Fault 7, planted: the model below the adapters of fine-tuning as the reference is seen in the first loss.
    wrong = aligned | {"reference": str(place / "base"), "steps": 1}
    tele.run({"run": ["dpo"], "start": str(place / "adapted" / "sft"), "dpo": wrong}, place / "adapted_wrong")
    assert abs(lines(place / "adapted_wrong", "dpo")[0]["loss"] - math.log(2)) > 1e-3
    merged = checkpoint.load(place / "adapted" / "sft").params
    found = checkpoint.load(place / "adapted" / "dpo").params
    moved = [name for name, leaf in flatten(found).items() if (leaf != flatten(merged)[name]).any()]
    assert moved == ["layers.attn.q"]


def around(place, directory, cfg, previous):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    said = []
    how = {"checkpoints": {}, "known": (), "base": None, "model": dict, "say": said.append}
    return Surroundings(cfg=cfg, mesh=mesh, directory=directory, previous=previous, **how), said


def test_the_reference_is_computed_again_where_anything_in_its_key_changes(place, tmp_path, monkeypatch):
    cfg = tele.ModelConfig(**MODEL)
    monkeypatch.setattr(
        reference, "compute", lambda cfg, params, store, count, mesh, rows: np.arange(count, dtype=np.float32)
    )

    def made(previous="base", own=cfg, **fields):
        batches = RecordBatches(read_stage(stage(place, "dpo", **fields), "config.own"), "pairs", sources.Indexes())
        surroundings, said = around(place, tmp_path, own, place / previous)
        reference.attach(batches, surroundings, None, 4)
        return len(said), batches

    count, batches = made()
    assert count == 2, "for training and held out"
    assert made()[0] == made(batch_size=4)[0] == 0
    feed = batches.feed()
    batch = next(feed)
    feed.close()
    assert (batch["reference"] == batch["sequences"]).all(), "of each answer its own"
    other = json.loads(json.dumps(stage(place, "dpo")["data"]))
    other["sources"]["numbers"]["files"] = [str(write_lines(tmp_path / "p.jsonl", map(record, range(20))))]
    assert made(data=other)[0] == 1, "other data to train on, the same held out"
    for changed in ({"previous": "other"}, {"own": cfg.replace(dtype="bfloat16")}, {"seq_len": 48}):
        assert made(**changed)[0] == 2, changed
    for file in (tmp_path / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DamageError, match=r"reference/[0-9a-f]{16}.npz: damaged .*; remove it"):
        made()


def test_a_sample_has_at_most_the_rows_that_were_asked_for(place):
    made = read_stage(stage(place, "reward", rows=16), "config.own")  # of 8 pairs: every answer has a row of its own
    batches = RecordBatches(made, "pairs", sources.Indexes())
    one, some, all_of_them = (batches.sample(rows, 6) for rows in (1, 3, 10**6))
    assert one.shape == (1, 6) and some.shape == (3, 6) and 3 < len(all_of_them) < 10**6
    np.testing.assert_array_equal(some[:1], one)


def test_what_the_reference_gives_is_the_sum_over_the_answer(place):
    """Against a float64 model, answer by answer; neither the batch nor its order change anything."""
    batches = RecordBatches(read_stage(stage(place, "dpo"), "config.own"), "pairs", sources.Indexes())
    loaded, store = checkpoint.load(place / "base"), batches.store
    mesh, count = make_mesh(MeshConfig(), jax.devices()[:1]), 5
    found = reference.compute(loaded.cfg, loaded.params, store, count, mesh, rows=3)
    for number in range(count):
        own = answer_of(store.read_answers(np.array([[number, 4]])), 0, 0)
        logits = forward_in_float64(loaded.cfg, loaded.params, own["tokens"][None])[0]
        every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        learned = np.flatnonzero(own["loss_weights"])
        assert found[number] == pytest.approx(every[learned, own["targets"][learned]].sum(), abs=1e-4)


BAD = [
    ({"kind": "dpo", "beta": 0.0}, "config.own: beta=0.0 must be above 0"),
    ({"kind": "dpo", "label_smoothing": 0.1}, "above 0 with 'conservative', and 0 otherwise"),
    ({"kind": "dpo", "reference": "nowhere"}, "config.own.reference: no earlier stage of the run, and no checkpoint"),
    ({"kind": "dpo", "loss": "simpo"}, "config.own.loss"),
    ({"kind": "reward", "lora": LORA}, "config.own: lora: the scalar head is no adapter"),
    ({"kind": "reward", "centre": -1.0}, "config.own: centre=-1.0 must not be negative"),
    ({"kind": "reward", "mask_ramp": 2}, "config.own: mask_ramp: "),
    ({"kind": "reward", "keep_best": "bits_per_byte/numbers"}, "expected accuracy/DOMAIN"),
    ({"kind": "dpo", "rankings": "best"}, "config.own.rankings"),
    ({"kind": "dpo", "rows": 17}, "config.own: rows=17 of 16 answers: give from 1 to that many"),
    ({"kind": "reward", "rows": 3, "microbatches": 2}, "config.own: rows=3 does not divide into microbatches=2"),
    ({"kind": "dpo", "after": "zz"}, "config.own.after='zz': no stage comes before own; leave it out"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_bad_page_is_one_line(place, tmp_path, capsys, fields, message):
    own = page(place, **fields)
    (tmp_path / "bad.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({own!r})\n"
    )
    assert main(["train", "--config", str(tmp_path / "bad.py"), "--workdir", str(tmp_path / "w")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_plan_has_the_arrays_of_a_batch_and_lowers_the_step_of_the_stage(place, kind):
    made = read_stage(stage(place, kind), "config.own")
    module = find_kind(kind)
    known = {"reference": np.zeros((8, 2), np.float32)} if kind == "dpo" else {}
    batch = {name: (array.shape, array.dtype) for name, array in (first_batch(place, kind) | known).items()}
    drawn = batch["tokens"][0]  # a batch is as wide as its fullest row, which two longest answers would fill
    full = {name: ((8, 2 * 64) if shape == drawn else shape, dtype) for name, (shape, dtype) in batch.items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in module.shapes(made).items()} == full
    cfg = stages.model_of(made, tele.ModelConfig(**MODEL))
    job = TrainJob(slice=find_slice("v5e:2x2"), mesh=MeshConfig(fsdp=4), cfg=cfg, batch_size=8, seq_len=64, stage=made)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    lowered = job.lower(mesh).as_text()
    assert "tensor<8x128" in lowered and job.tokens == 16 * 64  # of 8 pairs, 16 sequences, two in a row


def test_dpo_before_any_model_is_refused(place, tmp_path):
    own = page(place, "dpo", model=MODEL)
    del own["start"]
    with pytest.raises(tele.errors.UserError, match=r"no model to align before the first stage; config.start names"):
        tele.run(own, tmp_path / "w")


def test_a_language_model_is_not_trained_on_from_a_reward_model_by_oversight(place):
    """With config.start as the model of `reward`, and with an earlier stage; a growth in between changes nothing."""
    base, reward, own = page(place, "dpo"), stage(place, "reward"), stage(place, "dpo")
    with pytest.raises(UserError, match=r"config\.own would continue the model of config\.reward.*before that stage"):
        stages.run_config(base | {"run": ["reward", "own"], "reward": reward})
    grown = {"kind": "grow", "model": {"mlp_dim": 32}}
    for between in ([], ["larger"]):
        names = ["first", "reward", *between, "own"]
        chain = base | {"run": names, "reward": reward, "first": own} | {name: grown for name in between}
        with pytest.raises(UserError, match=r"config\.reward, which scores text; .* such as after='first'"):
            stages.run_config(chain)
        stages.run_config(chain | {"own": own | {"after": "first"}})
        stages.run_config(chain | {"own": reward})


def test_a_reference_has_to_have_the_positions_of_the_rows(place, tmp_path):
    """A checkpoint, and an earlier stage of the run."""
    cfg = tele.ModelConfig(**MODEL | {"max_seq_len": 32})
    checkpoint.save(tmp_path / "small", cfg, tele.init(cfg, jax.random.key(0)))
    match = r"config\.own\.reference=.*: seq_len=64 is above the model's max_seq_len=32"
    with pytest.raises(UserError, match=match):
        tele.run(page(place, "dpo", reference=str(tmp_path / "small")), tmp_path / "w")
    first = stage(place, "dpo", seq_len=32)
    run = {"run": ["first", "grow", "own"], "start": str(tmp_path / "small"), "first": first}
    run |= {"grow": {"kind": "grow", "model": {"max_seq_len": 64}}, "own": stage(place, "dpo", reference="first")}
    with pytest.raises(UserError, match=match):
        tele.run(run, tmp_path / "w")


def test_keep_best_without_held_out_data_is_refused(place, tmp_path):
    own = page(place, "reward", keep_best="accuracy/numbers")
    del own["own"]["data"]["sources"]["numbers"]["validation_files"]
    with pytest.raises(UserError, match=r"config\.own\.keep_best='accuracy/numbers': no domain has held-out data"):
        tele.run(own, tmp_path / "w")


def test_the_best_checkpoint_is_kept_by_accuracy(place, tmp_path):
    own = page(place, "reward", keep_best="accuracy/numbers", eval_every=1, steps=2)
    tele.run(own, tmp_path / "w")
    assert list((tmp_path / "w" / "own" / "best").iterdir())


def scores_of(ids, pad_id, width):
    """A row of a sequence, padded to a width."""
    n = len(ids)
    rows = {"tokens": np.full((1, width), pad_id, np.int32), "ends": np.array([n - 1], np.int32)}
    rows["tokens"][0, :n] = ids
    inside = np.arange(width) < n
    return rows | {
        "segment_ids": inside[None].astype(np.int32),
        "positions": np.where(inside, np.arange(width), 0)[None],
    }


def at_the_first_padding(cfg, params, rows, masks=None):
    """Fault 2: the end is where the first token of padding stands, whatever the length says."""
    ends = (rows["tokens"] == PAD).argmax(axis=1) - 1
    return pairs.scores(cfg, params, {**rows, "ends": ends}, masks)


def one_too_early(cfg, params, rows, masks=None):
    """Fault 3: the head reads the token before the last."""
    return pairs.scores(cfg, params, {**rows, "ends": rows["ends"] - 1}, masks)


PAD = 3


@pytest.mark.parametrize("compute", [pairs.scores, at_the_first_padding, one_too_early])
def test_a_score_is_read_at_the_last_token_by_its_index(compute):
    """The token of padding stands inside the sequence and ends it; other padding, and other rows, change no score."""
    cfg = tele.ModelConfig(**MODEL, scalar_head=True)
    params = tele.init(cfg, jax.random.key(3))
    ids = [7, PAD, 9, 30, 31, PAD]
    x = np.asarray(tele.model.decoder.hidden(cfg, params, np.array([ids])))[0, -1]
    wanted = float(x.astype(np.float64) @ np.asarray(params["scalar_head"]["kernel"], np.float64)[:, 0])
    rows = [scores_of(ids, pad, width) for pad, width in ((PAD, 6), (PAD, 16), (44, 16))]
    found = [float(compute(cfg, params, row)[0]) for row in rows]
    other = scores_of(list(range(100, 114)), PAD, 16)
    both = {name: np.concatenate([other[name], rows[1][name]]) for name in other}
    both["ends"][1] += 16
    found.append(float(compute(cfg, params, both)[1]))
    fine = bool(np.abs(np.array(found) - wanted).max() < 1e-5)
    assert fine is (compute is pairs.scores), found


def test_the_head_of_a_reward_model_is_drawn_from_the_seed(place, tmp_path):
    """Fault 10: the stage that hardly moves leaves the head that its seed gives, beside the model it began with."""
    still = {"optimizer": {"learning_rate": 1e-30}, "steps": 1, "eval_every": 0, "seed": 7}
    tele.run(page(place, "reward", **still), tmp_path / "W")
    found, base = checkpoint.load(tmp_path / "W"), checkpoint.load(place / "base")
    by_seed = [tele.init(found.cfg, jax.random.key(seed))["scalar_head"]["kernel"] for seed in (7, 0)]
    np.testing.assert_array_equal(found.params["scalar_head"]["kernel"], by_seed[0])
    assert (np.asarray(by_seed[0]) != by_seed[1]).any()
    np.testing.assert_array_equal(found.params["embed"]["table"], base.params["embed"]["table"])


def test_a_reward_model_keeps_the_head_of_the_language_model(place, finished):
    """Its loss does not read that head, which weight decay would shrink: bit for bit as it was, and without moments."""
    found, base = checkpoint.load(finished["reward"]), checkpoint.load(place / "base")
    same = {
        name: (leaf == flatten(base.params)[name]).all()
        for name, leaf in flatten(found.params).items()
        if name in flatten(base.params)
    }
    assert [name for name, value in same.items() if value] == ["lm_head.kernel"]
    moments = [
        leaf for path, leaf in jax.tree.leaves_with_path(found.opt_state) if "lm_head" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2 and not any(leaf.any() for leaf in moments)


SCORE = ["score-reward", "--batch-size", "3"]


def test_score_reward_writes_the_scores_of_every_record(place, finished, tmp_path, capsys):
    """Pairs, a ranking, a dialogue and a text, each the score that it has alone; the accuracy is that of the pairs."""
    found = [*map(record, range(3)), {"prompt": "Which?", "answers": ["a", "b", "c"]}]
    found += [{"instruction": "Say one.", "output": "one"}, {"text": "no dialogue"}]
    file, out = write_lines(tmp_path / "all.jsonl", found), tmp_path / "scores.jsonl"
    assert main([*SCORE, str(finished["reward"]), file, "--out", str(out), "--json", str(tmp_path / "f.json")]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(line) for line in lines] == [["line", "chosen", "rejected"]] * 3 + [["line", "answers"]] + [
        ["line", "score"]
    ] * 2
    model = checkpoint.load(finished["reward"])
    vocabulary = load_vocabulary(place / "tokenizer.model")
    ids = [*vocabulary.encode("no dialogue"), vocabulary.eos_id]
    rows = scores_of(ids, 0, len(ids))
    assert lines[-1]["score"] == pytest.approx(float(pairs.compiled_scores(model.cfg, model.params, rows)[0]), abs=1e-5)
    margins = [line["chosen"] - line["rejected"] for line in lines[:3]]
    margins += [lines[3]["answers"][a] - lines[3]["answers"][b] for a, b in ((0, 1), (0, 2), (1, 2))]
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["pairs"] == 6 and figures["accuracy"] == np.mean(np.array(margins) > 0)
    low, high = figures["interval"]
    # Four records with answers to compare: the three pairs of the ranking are not three independent trials.
    assert figures["interval"] == list(scoring.wilson(figures["accuracy"], 4))
    assert 0 <= low <= figures["accuracy"] <= high <= 1 and "95% interval" in capsys.readouterr().out


def test_what_score_reward_cannot_use_is_one_line(place, finished, tmp_path, capsys):
    good = write_lines(tmp_path / "good.jsonl", [record(0)])
    bad = write_lines(tmp_path / "bad.jsonl", [record(0), {**record(1), "rejected": ""}])
    odd, values = write_lines(tmp_path / "odd.jsonl", [{"text": 5}]), str(tmp_path / "ppo")
    model = checkpoint.load(finished["reward"])
    checkpoint.save(values, model.cfg, model.params, provenance=[{"kind": "reward"}, {"kind": "ppo"}, {"kind": "sft"}])
    (tmp_path / "other.model").write_bytes(tokenizer_bytes("tele_flm"))
    reward, out = str(finished["reward"]), ["--out", str(tmp_path / "s.jsonl")]
    cases = [
        ([str(finished["dpo"]), good], "has no scalar head, so it is no reward model"),
        ([reward, good, "--tokenizer", str(tmp_path / "other.model")], "was trained with another tokenizer than"),
        ([reward, bad], "bad.jsonl, line 2: rejected: messages[1].content is empty"),
        ([reward, good, "--max-tokens", "5"], "tokens, more than 5"),
        ([reward, str(tmp_path / "none.jsonl")], "No such file"),
        ([str(tmp_path / "nowhere"), good], "nowhere"),
        ([reward, good, "--max-tokens", "65"], "max_seq_len"),
        ([reward, good, "--batch-size", "3", "--mesh", "data=2"], "batch_size=3 does not divide over the 2 devices"),
        ([reward, odd], "is neither a pair"),
        ([values, good, "--tokenizer", str(place / "tokenizer.model")], "gives values of PPO, not scores"),
        ([reward, good, "--out", bad], "bad.jsonl: is there already; name a new file"),
    ]
    for arguments, message in cases:
        assert main([*SCORE, *out, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "s.jsonl").exists()

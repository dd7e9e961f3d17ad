"""Rollouts: what is drawn depends on seed, draw and row alone; killed or failed stages go on to the same bits."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.align import experience
from tele_jax.align.pairs import compiled_scores
from tele_jax.align.prompts import Prompts
from tele_jax.aot import cost
from tele_jax.aot.jobs import TrainJob
from tele_jax.aot.topology import find_slice
from tele_jax.axes import flatten
from tele_jax.cli.plan import _rollout as planned_rollout
from tele_jax.data import sources
from tele_jax.data.surroundings import Surroundings
from tele_jax.errors import DamageError, UserError
from tele_jax.processes import StopSignal
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh
from tele_jax.stages import find_kind, read_stage, run_config
from tele_jax.train import metrics
from tele_jax.train import workdir as owned
from tele_jax.train.trainer import Stopped
from tests import reference
from tests.inference.test_chat import tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=440, max_seq_len=64, dtype="float32",
    remat="none",
)  # fmt: skip
REWARDS = """
import os, pathlib, signal, zlib
HERE = pathlib.Path(__file__).parent

def graded(prompt, reply, record):
    return zlib.crc32((prompt + reply).encode()) % 8 / 8

def first_word(prompt, reply, record):
    return 1.0 if record["number"] % 2 else graded(prompt, reply, record)

def counted(prompt, reply, record):
    \"\"\"Kills the run, or raises, at the reply that the file `after` counts.\"\"\"
    calls, after = HERE / "calls", HERE / "after"
    with calls.open("a") as file:
        file.write(".")
    if after.exists() and calls.stat().st_size > int(after.read_text().split()[1]):
        if after.read_text().startswith("kill"):
            os.kill(os.getppid(), signal.SIGKILL)
        raise RuntimeError("no reward today")
    return graded(prompt, reply, record)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tokenizer, prompts, rewards and a checkpoint to start from."""
    directory = tmp_path_factory.mktemp("rollouts")
    (directory / "tokenizer.model").write_bytes(tokenizer_bytes())
    lines = [{"prompt": "ab" * (1 + i % 4) + str(i), "number": i} for i in range(24)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = [{"prompt": f"held out {i}", "number": i} for i in range(3)]
    (directory / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    (directory / "rollout_rewards.py").write_text(REWARDS)
    params = tele.init(CFG, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 3, params)  # replies that differ
    checkpoint.save(directory / "start", CFG, params)
    return directory


@pytest.fixture
def rewards(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", f"{place}:{os.environ.get('PYTHONPATH', '')}")
    for name in ("calls", "after"):
        (place / name).unlink(missing_ok=True)


def table(place, kind="grpo", reward="graded", **fields):
    data = {"prompts": {"files": [str(place / "prompts.jsonl")], "format": "prompts"}}
    made = {"kind": kind, "data": {"tokenizer": str(place / "tokenizer.model"), "sources": data}, "steps": 6}
    made |= {"optimizer": {"learning_rate": 3e-3}, "seq_len": 32, "batch_size": 8, "log_every": 1}
    made |= {"rollout_prompts": 4, "answers": 4, "max_new_tokens": 5, "rollout_epochs": 2, "seed": 3}
    reward = reward if isinstance(reward, dict) else {"function": f"rollout_rewards:{reward}"}
    return made | {"reward": reward, "checkpoint_every": 100} | fields


def opened(place, kind="grpo", mesh=None, head=False, **fields):
    """The feed of a stage, and the stage, with the parameters of `start`."""
    stage = read_stage(table(place, kind, **fields), "config.stage")
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    module = find_kind(kind)
    cfg = module.model(stage, CFG) if hasattr(module, "model") else CFG
    cfg = cfg.replace(scalar_head=cfg.scalar_head or head)
    params = checkpoint.load(place / "start", mesh).params
    if cfg.scalar_head:
        params = params | {"scalar_head": {"kernel": jnp.ones((CFG.embed_dim, 1)) / 8}}
    where = {"directory": place / "stage", "previous": place / "start", "checkpoints": {}, "known": (), "base": None}
    around = Surroundings(cfg=cfg, mesh=mesh, model=lambda: params, say=print, **where)
    return module.feed(stage, module.batches(stage, sources.Indexes()), around), stage


def same(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(second[name]), err_msg=name)


def lines(workdir, stage="rl"):
    """The figures of a stage, without those of time."""
    timed = ("tokens_per_second", "model_flops_per_second", "mfu")
    found = metrics.read(workdir / stage / "metrics" / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in timed} for line in found]


ALL = {"stale": 1, "sampler_cap": 2.0, "kl_coef": 0.1, "dynamic_draws": 1, "temperature": 1.2}


@pytest.mark.parametrize(("kind", "fields"), [("grpo", ALL), ("ppo", {"kl_coef": 0.1, "kl_target": 0.5})])
def test_a_feed_goes_on_to_the_bit_from_any_minibatch(place, rewards, kind, fields):
    feed, _ = opened(place, kind, **fields)
    states, batches, figures = [feed.state()], [], []
    for _ in range(6):  # one rollout and a half
        batches.append(next(feed))
        states.append(feed.state())
        figures.append(feed.figures())
    feed.close()
    assert {np.asarray(batch["tokens"]).tobytes() for batch in batches[:4]} != {batches[0]["tokens"].tobytes()}
    again, _ = opened(place, kind, **fields)
    for begin in (0, 1, 3, 4, 5):
        again.restore(states[begin])
        for batch, told in zip(batches[begin:], figures[begin:], strict=True):
            same(next(again), batch)
            assert again.figures() == told
    with pytest.raises(DamageError, match="the saved rollout is damaged"):
        again.restore(states[1][:-40])
    again.close()
    other, _ = opened(place, kind, **fields | {"max_new_tokens": 4})
    with pytest.raises(UserError, match=r"saved for other settings: max_new_tokens was 5, now 4"):
        other.restore(states[1])
    other.close()


def test_neither_cuts_nor_devices_change_what_is_drawn(place, rewards):
    """Eight simulated devices, five rows at once: the same tokens, and log-probabilities within rounding."""
    first, _ = opened(place, kl_coef=0.1)
    expected = jax.device_get(next(first))
    figures = first.figures()
    first.close()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    for how in ({"rows_at_once": 5}, {"mesh": mesh, "rows_at_once": 16}):
        feed, _ = opened(place, kl_coef=0.1, **how)
        batch = jax.device_get(next(feed))
        feed.close()
        for name, array in expected.items():
            np.testing.assert_allclose(batch[name], array, atol=1e-5, err_msg=name)
        assert feed.figures() == pytest.approx(figures, abs=1e-5)


def test_the_replies_that_are_trained_on_are_the_ids_that_were_drawn(place, rewards):
    """Fault 8: a text that is encoded again has other ids; and the figures are those of the rows."""
    feed, _ = opened(place, batch_size=16, rollout_epochs=1)
    batch, figures = jax.device_get(next(feed)), feed.figures()
    samples = [json.loads(line) for line in (place / "stage" / "samples" / "0.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {"prompt", "reply", "reward", "tokens", "stopped"} == samples[0].keys()
    prompts = [sample["prompt"] for sample in samples]
    assert len(set(prompts[:4])) == 4 and prompts[4:] == prompts[:4], "two replies to each of four prompts"
    drawn = batch["loss_weights"].sum(axis=1)
    assert figures["reply_tokens"] == pytest.approx(drawn.mean()) and drawn.max() <= 5
    mask = batch["loss_weights"] > 0
    np.testing.assert_allclose(batch["old_logp"][mask], batch["sampler_logp"][mask], atol=1e-5)
    vocabulary, differs = feed._opened.vocabulary, 0
    for tokens, weights in zip(batch["tokens"], mask, strict=True):
        reply = tokens[np.flatnonzero(weights) + 1].tolist()
        text = vocabulary.decode([token for token in reply if token not in feed._opened.stop_ids])
        differs += vocabulary.encode(text) != [token for token in reply if token not in feed._opened.stop_ids]
    assert differs > 0, "the fault could show"
    feed.close()


def test_prompts_whose_replies_have_equal_rewards_are_drawn_anew(place, rewards):
    feed, _ = opened(place, reward="first_word", dynamic_draws=3, batch_size=16, rollout_epochs=1)
    batch, figures = jax.device_get(next(feed)), feed.figures()
    feed.close()
    assert figures["draws"] > 1 and 0 < figures["equal_groups"] < 1
    assert (np.abs(batch["advantages"]).max(axis=1) > 0).mean() > 0.7, "every group that is left differs"
    limited, _ = opened(place, reward="first_word", dynamic_draws=0, batch_size=16, rollout_epochs=1)
    batch = jax.device_get(next(limited))
    assert limited.figures()["draws"] == 1 and (np.abs(batch["advantages"]).max(axis=1) == 0).any()
    limited.close()


def test_the_penalty_of_long_replies_does_not_make_the_rewards_of_a_prompt_differ(place, rewards):
    feed, _ = opened(place, reward="first_word", overlong_tokens=4)
    draw = feed._draw_once

    def uneven(params):
        found, failures = draw(params)
        assert (found.lengths - found.prompts == 5).all(), "all are cut"
        found.lengths[::2] -= 2
        return found, failures

    feed._draw_once = uneven
    found, figures = feed._draw(feed._around.model())
    feed.close()
    assert figures["equal_groups"] > 0
    right = np.repeat((found.record.reshape(4, 4)[:, 0] % 2).astype(bool), 4)  # first_word gives them 1
    np.testing.assert_allclose(found.rewards[right].reshape(-1, 2), [[0.5, 0.0]] * (right.sum() // 2))


def test_figures_leave_out_no_rollout_between_two_calls(place, rewards):
    """Means over the rollouts that began, sums of what was counted; the state keeps what was not told yet."""
    (place / "after").write_text("raise 10")  # of 16 rewards of the first rollout, 6 fail, and all of the second
    reward = {"function": "rollout_rewards:counted", "on_failure": 0.25}
    feed, _ = opened(place, reward=reward, rollout_epochs=1, max_kl=0.1)
    rewards_of = []
    for _ in range(2):
        next(feed)
        rewards_of.append(feed._figures["reward"])
        feed.stepped({"kl_old": 0.2})  # leaves out the second of two minibatches
    state = feed.state()
    told = feed.figures()
    assert told["reward_failures"] == 6 + 16 and told["steps_left_out"] == 2 and rewards_of[0] != rewards_of[1] == 0.25
    assert told["reward"] == pytest.approx(np.mean(rewards_of))
    assert feed.figures() == feed._figures | {"reward_failures": 0, "steps_left_out": 0}
    feed.restore(state)
    assert feed.figures() == told
    feed.close()


def test_a_policy_that_has_moved_too_far_ends_the_rollout(place, rewards):
    feed, _ = opened(place, max_kl=0.1)
    first = next(feed)
    feed.stepped({"kl_old": 0.05})
    assert feed._at == 1
    feed.stepped({"kl_old": 0.2})
    state = feed.state()
    second = next(feed)
    assert feed._rollout == 2
    assert [feed.figures()["steps_left_out"] for _ in range(2)] == [3, 0], "told once"
    feed.restore(state)
    same(next(feed), second)
    assert first["tokens"].shape[0] == second["tokens"].shape[0]
    feed.close()


def test_a_killed_run_equals_one_that_was_not(place, rewards, tmp_path):
    """SIGKILL while rollout 2 is rewarded; the checkpoint is of the middle of rollout 1."""
    page = {"run": ("rl",), "start": str(place / "start"), "rl": table(place, reward="counted", **ALL)}
    page["rl"] |= {"steps": 7, "checkpoint_every": 3}
    tele.run(page, tmp_path / "whole")
    whole = (place / "calls").stat().st_size
    (place / "calls").unlink()
    (place / "after").write_text(f"kill {whole * 3 // 4}")
    config = tmp_path / "page.py"
    config.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({page!r})\n")
    command = [sys.executable, "-m", "tele_jax.cli.main", "train", "--config", str(config)]
    killed = subprocess.run([*command, "--workdir", str(tmp_path / "killed")], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert [int(p.name) for p in (tmp_path / "killed" / "rl" / "checkpoints").iterdir() if p.name.isdigit()] == [3]
    (place / "after").unlink()
    tele.run(page, tmp_path / "killed")
    found = [checkpoint.load(tmp_path / name / "rl" / "checkpoints") for name in ("whole", "killed")]
    same(*(flatten(each.params) for each in found))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    samples = [sorted((tmp_path / name / "rl" / "samples").iterdir()) for name in ("whole", "killed")]
    assert [p.read_text() for p in samples[0]] == [p.read_text() for p in samples[1]]


def test_a_reward_that_fails_loses_no_step(place, rewards, tmp_path):
    page = {"run": ("rl",), "start": str(place / "start"), "rl": table(place, reward="counted", steps=5)}
    page["rl"]["data"]["sources"]["prompts"]["validation_files"] = [str(place / "held.jsonl")]
    page["rl"]["evaluation_reward"] = {"function": "rollout_rewards:graded"}
    (place / "after").write_text("raise 22")  # 16 rows of rollout 1, six of rollout 2
    with pytest.raises(UserError, match=r"counted: RuntimeError: no reward today .* to record \d+ \('ab"):
        tele.run(page, tmp_path / "w")
    assert checkpoint.open_lazy(tmp_path / "w").provenance[-1]["step"] == 4
    (place / "after").unlink()
    (place / "calls").unlink()
    tele.run(page, tmp_path / "whole")
    page["rl"]["reward"] |= {"time_limit": 60.0, "processes": 2}
    summary = tele.run(page, tmp_path / "w")[-1]
    assert lines(tmp_path / "w") == lines(tmp_path / "whole")
    assert 0 <= summary["figures_after"]["reward/prompts"] <= 1
    go_on_with_other_rewards(page, tmp_path / "w")


def go_on_with_other_rewards(page, workdir):
    """What judges and how often it is written changes freely, what is learned by --from; its samples are set aside."""
    free = {"rows_at_once": 4, "samples_every": 1, "evaluation_reward": None}
    page = page | {"rl": page["rl"] | free}
    owned.claim(run_config(page), workdir, None, print)
    assert owned.read_changes(workdir / "rl") == []
    changed = {"max_kl": 9.0, "clip_low": 0.1, "clip_high": 0.3}
    changed["reward"] = page["rl"]["reward"] | {"function": "rollout_rewards:first_word", "on_failure": 0.5}
    page = page | {"rl": page["rl"] | changed}
    with pytest.raises(
        UserError, match=r"reward.on_failure was None, is 0.5; .*--from STEP .* changes it from a check"
    ):
        owned.claim(run_config(page), workdir, None, print)
    abandoned = workdir / "rl" / "samples" / "5.jsonl"
    abandoned.write_text('{"prompt": "q", "reply": "a", "reward": 0.0}\n')
    tele.run(page, workdir, from_step=4)
    assert sorted(path.name for path in (workdir / "rl" / "set_aside" / "1").iterdir()) == [
        "5", "metrics.jsonl", "samples_5.jsonl",
    ]  # fmt: skip
    assert sorted(owned.samples(workdir / "rl")) == [0, 4], "the report shows no replies of what was given up"
    assert set(owned.read_changes(workdir / "rl")[0]["config"]) == {
        "clip_high", "clip_low", "max_kl", "reward.function", "reward.on_failure",
    }  # fmt: skip
    before, now = (lines(where)[-2] for where in (workdir.with_name("whole"), workdir))
    assert before["step"] == now["step"] == 5 and now["reward"] > before["reward"], "first_word gives 1 to odd numbers"


def test_a_stop_does_not_wait_for_the_rewards_of_a_rollout(place, rewards, tmp_path, monkeypatch):
    page = {"run": ("rl",), "start": str(place / "start"), "rl": table(place, steps=5, reward="counted")}
    drawn, draw = [], Prompts.draw
    with monkeypatch.context() as patched:
        patched.setattr(Prompts, "draw", lambda self, *given, **how: drawn.append(1) or draw(self, *given, **how))
        patched.setattr(StopSignal, "__call__", lambda self: len(drawn) == 2)  # while rollout 2 is drawn
        with pytest.raises(Stopped, match="stopped before the next batch of stage rl; its steps are saved"):
            tele.run(page, tmp_path / "w")
    assert checkpoint.open_lazy(tmp_path / "w").provenance[-1]["step"] == 4
    assert (place / "calls").stat().st_size == 16, "rewards of rollout 1 alone"
    tele.run(page, tmp_path / "w")
    assert (place / "calls").stat().st_size == 32
    tele.run(page, tmp_path / "whole")
    assert lines(tmp_path / "w") == lines(tmp_path / "whole")


def test_a_judge_that_fails_in_an_evaluation_loses_no_step(place, rewards, tmp_path):
    """The next start makes up the evaluation that failed, also where no line of figures was due at that step."""
    page = {"run": ("rl",), "start": str(place / "start"), "rl": table(place, steps=5, eval_every=3, log_every=2)}
    page["rl"]["data"]["sources"]["prompts"]["validation_files"] = [str(place / "held.jsonl")]
    page["rl"]["evaluation_reward"] = {"function": "rollout_rewards:counted"}
    (place / "after").write_text("raise 4")  # 3 held-out prompts before the first step, one at step 3
    with pytest.raises(UserError, match=r"counted: RuntimeError: no reward today"):
        tele.run(page, tmp_path / "w")
    assert checkpoint.open_lazy(tmp_path / "w").provenance[-1]["step"] == 3
    (place / "after").unlink()
    tele.run(page, tmp_path / "w")
    (place / "calls").unlink()
    tele.run(page, tmp_path / "whole")
    judged = [[line for line in lines(tmp_path / w) if "eval/reward/prompts" in line] for w in ("w", "whole")]
    assert judged[0] == judged[1] and [line["step"] for line in judged[0]] == [0, 3, 5]
    same(*(flatten(checkpoint.load(tmp_path / w / "rl" / "checkpoints").params) for w in ("w", "whole")))


def test_replies_that_are_all_cut_can_be_left_out_of_the_loss(place, rewards, tmp_path):
    page = {"run": ("rl",), "start": str(place / "start"), "rl": table(place, mask_cut=True, steps=1)}
    tele.run(page, tmp_path / "w")
    (line,) = lines(tmp_path / "w")
    assert line["cut_share"] == 1 and line["reward_std"] > 0, "the case that this test is about"
    assert line["loss"] == line["grad_norm"] == 0
    found = [checkpoint.load(path).params for path in (place / "start", tmp_path / "w")]
    same(*map(flatten, found))


def test_a_reward_model_is_read_at_the_last_token_by_index(place):
    """The stop id is the padding, and a score depends neither on the other rows nor on the padding."""
    cfg = CFG.replace(scalar_head=True)
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    params["scalar_head"] = {"kernel": np.random.default_rng(1).normal(size=(16, 1))}
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    rng, stop = np.random.default_rng(2), 2
    prompts = [[stop, *rng.integers(3, 440, n)] for n in (1, 5, 3)]
    replies = [([*rng.integers(3, 440, n).tolist(), stop], np.zeros(n + 1)) for n in (4, 1, 2)]
    none = np.zeros(3, np.int32)
    found = []
    for width in (16, 32):
        made = experience.drawn(prompts, replies, stop_ids=[2], seq_len=width, pad_id=stop, record=none, group=none)
        batch = experience.rows(made, unit=width, pad_id=stop) | {"ends": made.lengths - 1}
        all_ends = {"ends": batch["ends"] + batch["tokens"].shape[1] * np.arange(3)}
        found.append(np.asarray(compiled_scores(cfg, single, batch | all_ends)))
        found.append(
            np.concatenate(
                [compiled_scores(cfg, single, {n: a[i : i + 1] for n, a in batch.items()}) for i in range(3)]
            )
        )
    for row, (prompt, (reply, _)) in enumerate(zip(prompts, replies, strict=True)):
        head = {"lm_head": {"kernel": params["scalar_head"]["kernel"]}}
        expected = reference.forward(cfg, params | head, np.array([[*prompt, *reply]]))[0, -1, 0]
        np.testing.assert_allclose([scores[row] for scores in found], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"batch_size": 6}, r"batch_size=6 does not divide the 16 rows of a rollout"),
        ({"max_new_tokens": 32}, r"max_new_tokens=32 leaves no room for a prompt in seq_len=32"),
        ({"stale": 1}, r"stale=1: replies of an older policy need importance weights; give sampler_cap"),
        ({"stale": 2, "sampler_cap": 2.0}, r"stale=2: 0, or 1"),
        ({"answers": 1}, r"answers=1: replies are compared with each other"),  # not that batch_size does not divide
        ({"overlong_tokens": 5}, r"overlong_tokens=5 must be below max_new_tokens=5"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"top_p": 0.9}, r"top_p: unknown key"),
        ({"reward": {}}, r"config\.stage\.reward: give one of function, verifier and model, not none"),
        ({"kind": "ppo", "kl_target": 1.0}, r"kl_target=1\.0 and kl_coef=0\.0: both must be above 0"),
        ({"kind": "ppo", "dynamic_draws": 1}, r"dynamic_draws compares replies to one prompt"),
        ({"epochs": 2.0, "steps": None}, r"epochs: a stage that draws its replies has steps"),
    ],
)
def test_settings_that_cannot_be_are_a_line(place, fields, match):
    with pytest.raises(UserError, match=match):
        read_stage(table(place) | fields, "config.stage")


def test_a_reference_needs_a_model_to_begin_with(place, rewards):
    stage = read_stage(table(place, kl_coef=0.1), "config.stage")
    kind, mesh = find_kind("grpo"), make_mesh(MeshConfig(), jax.devices()[:1])
    around = Surroundings(CFG, mesh, place / "stage", None, {}, (), None, model=dict, say=print)
    with pytest.raises(UserError, match="kl_coef: a model that begins at random has no reference"):
        kind.feed(stage, kind.batches(stage, sources.Indexes()), around)
    assert dataclasses.replace(stage, reference="first").models == {"reference": "first"}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"function": "no_module_of_that_name:f"}, "No module named 'no_module_of_that_name'"),
        ({"function": "rollout_rewards:misspelt"}, "has no attribute 'misspelt'"),
        ({"model": "sft"}, "config.rl.reward.model='sft' has no scalar head: it is no reward model"),
        ({"model": "START"}, "has no scalar head: it is no reward model"),
    ],
)
def test_a_reward_that_cannot_be_is_found_before_the_first_step(place, rewards, tmp_path, reward, message):
    """Not when its stage begins, after hours of the stage before."""
    reward = {name: value.replace("START", str(place / "start")) for name, value in reward.items()}
    sft = {**table(place), "kind": "pretrain", "data": {**table(place)["data"]}}
    sft = {key: sft[key] for key in ("kind", "data", "steps", "optimizer", "seq_len", "batch_size")}
    sft["data"] = {**sft["data"], "sources": {"text": {"files": [str(place / "prompts.jsonl")]}}}
    page = {"run": ["sft", "rl"], "start": str(place / "start"), "sft": sft, "rl": {**table(place), "reward": reward}}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        tele.run(page, tmp_path / "W")
    assert str(caught.value).startswith("config.rl.reward") and not (tmp_path / "W" / "sft").exists()


def test_a_policy_with_a_scalar_head_has_values_where_they_are_read_alone(place, rewards):
    """GRPO may follow PPO, whose checkpoint has the head."""
    feed, stage = opened(place, head=True)
    assert "old_values" not in next(feed) and find_kind("grpo").shapes(stage).keys() == next(feed).keys()
    feed.close()


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_plan_has_the_arrays_of_a_minibatch_and_the_state_of_training_beside_a_rollout(place, rewards, kind):
    feed, stage = opened(place, kind, kl_coef=0.1)
    batch = {name: (array.shape, array.dtype) for name, array in next(feed).items()}
    feed.close()
    short = dataclasses.replace(stage, seq_len=batch["tokens"][0][-1])  # a batch is cut to its longest row
    module = find_kind(kind)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in module.shapes(short).items()} == batch
    cfg = module.model(stage, CFG) if hasattr(module, "model") else CFG
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    where = {"slice": find_slice("v5e:2x2"), "mesh": MeshConfig(fsdp=4), "cfg": cfg}
    job = TrainJob(**where, batch_size=8, seq_len=32, stage=stage)
    assert "tensor<8x32" in job.lower(mesh).as_text()
    drawn = planned_rollout(job)
    assert (drawn.batch_size, drawn.seq_len) == (16, 32) and drawn.kind in cost.__dict__["_WORK"]
    held = drawn.held(mesh)
    moments = job.held(mesh)["optimizer"]
    assert held["training optimizer"] == moments and "training parameters" not in held  # float32 both: they serve both
    assert drawn.lower(mesh).as_text()

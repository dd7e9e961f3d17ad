"""Generators of reasoning_gym as seqio Tasks of prompts, whose records their verifiers grade."""

import pytest

from tele_jax.align.rewards import Asked, RewardConfig, Rewards
from tele_jax.data import sources
from tele_jax.data.dialogue import render_prompt
from tele_jax.data.record_rows import RecordBatches
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.stages import read_stage
from tests.inference.test_chat import tokenizer_bytes


def test_two_generators_are_a_mixture_whose_records_their_own_verifiers_grade(tmp_path):
    reasoning_gym, seqio = pytest.importorskip("reasoning_gym"), pytest.importorskip("seqio")
    from tele_jax.align import gym

    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    small = {"max_terms": 2, "max_digits": 1}
    gym.register("test_sums", "chain_sum", vocabulary, size=30, seed=1, held_out=60, **small)
    gym.register("test_letters", "letter_counting", vocabulary, size=10, seed=2)
    seqio.MixtureRegistry.add("test_gym", [("test_sums", 3.0), ("test_letters", 1.0)])
    data = {"tokenizer": str(tmp_path / "tokenizer.model"), "sources": {"gym": {"task": "test_gym"}}}
    table = {"kind": "grpo", "data": data, "optimizer": {"learning_rate": 1e-3}, "steps": 1, "seq_len": 512}
    table |= {
        "batch_size": 40,
        "rollout_prompts": 40,
        "answers": 2,
        "max_new_tokens": 8,
        "reward": {"verifier": "of_record"},
    }
    batches = RecordBatches(read_stage(table, "config.grpo"), "prompts", sources.Indexes(), room=8)
    feed = batches.feed()
    batch = next(feed)
    feed.close()
    records = [batches.store.fields(number) for number in batch["record"].tolist()]
    names = [record["metadata"].count('"source_dataset": "chain_sum"') for record in records]
    assert sum(names) == 30, "three quarters of the rows, at the rates of the mixture"
    asked = []
    for ids, length, record in zip(batch["tokens"], batch["lengths"], records, strict=True):
        assert ids[:length].tolist() == render_prompt([{"role": "user", "content": record["prompt"]}], vocabulary)
        reply = record["answer"] if len(asked) % 2 else "-1"
        asked.append(Asked(record["prompt"], reply, record, "here"))
    rewards = Rewards(RewardConfig(verifier="of_record"))
    found, _ = rewards.score(asked, 0)
    rewards.close()
    assert (found[1::2] == 1).all() and (found[::2] < 1).all()
    made = reasoning_gym.create_dataset("chain_sum", size=30, seed=1, **small)
    assert {entry["question"].strip() for entry in made} >= {r["prompt"] for r, is_sum in zip(records, names) if is_sum}
    trained = {entry["question"].strip() for entry in made}
    held = seqio.get_mixture_or_task("test_sums").get_dataset(None, split="validation", shuffle=False)
    questions = [example["prompt"].decode() for example in held.as_numpy_iterator()]
    assert questions and not trained & {*questions}, "no question is both trained on and held out"
    for bad, match in (
        ({"name": "test_sums"}, "seqio has a task 'test_sums' already"),
        ({"generator": "chain_some"}, "reasoning_gym has no generator 'chain_some'; did you mean 'chain_sum'"),
        ({"size": 0}, "size=0 must be above 0"),
        ({"min_terms": 0}, "chain_sum of reasoning_gym: min_terms must be positive"),
        ({"most_terms": 3}, "chain_sum of reasoning_gym: .*most_terms"),
    ):
        with pytest.raises(UserError, match=match):
            options = {"name": "test_other", "generator": "chain_sum", "size": 3, "seed": 0} | bad
            gym.register(options.pop("name"), options.pop("generator"), vocabulary, **options)

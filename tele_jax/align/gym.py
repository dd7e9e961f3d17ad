"""Generators of reasoning_gym as seqio Tasks of prompts, whose records their verifiers grade.

    vocabulary = load_vocabulary("tokenizer.model")
    gym.register("sums", "chain_sum", vocabulary, size=20_000, seed=1, held_out=200, max_terms=3)
    config.grpo.data.sources = dict(sums=dict(task="sums", validation_split="validation"))
    config.grpo.reward = dict(verifier="chain_sum")

Several such Tasks make a Mixture by rates, as any others do.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tele_jax.data import dialogue, tasks
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError, check_seed, require, require_known, whole
from tele_jax.extras import need

FIELDS = ("prompt", "question", "answer", "metadata")  # of a record: texts; metadata is JSON


def register(
    name: str, generator: str, vocabulary: Vocabulary, *, size: int, seed: int, held_out: int = 0, **options: Any
) -> None:
    """Adds the Task `name` to seqio, with the splits "train" and, where there are held_out, "validation".

    An example has `inputs`, the ids of the question in the dialogue form of the vocabulary, behind which a model
    replies, and the texts FIELDS. Entries without an answer are left out.

    Args:
      name: name of the Task.
      generator: name of a generator, such as "chain_sum".
      vocabulary: encodes the questions.
      size: number of entries to train on.
      seed: seed of the generator.
      held_out: number of entries to be held out, those after the first `size`; one whose question is trained on is left
        out.
      options: those of the generator.

    Raises:
      UserError: there is no such generator or option, reasoning_gym or seqio is not installed, a Task of this name is
        there, or a number is out of its range.
    """
    gym, seqio, tf = (need(module, how=how) for module, how in _NEEDED)
    require(whole(size, "size") > 0, f"size={size} must be above 0")
    require(whole(held_out, "held_out") >= 0, f"held_out={held_out} must not be negative")
    known = sorted(gym.factory.DATASETS)
    require_known(generator, known, f"reasoning_gym has no generator {generator!r}")
    require(name not in seqio.TaskRegistry.names(), f"seqio has a task {name!r} already; give another name")
    try:
        made = gym.create_dataset(generator, size=size + held_out, seed=check_seed(seed), **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"{generator} of reasoning_gym: {error}") from None
    asked = {made[i]["question"] for i in range(size)} if held_out else set()

    def entries(split: str) -> Iterator[dict[str, Any]]:
        for i in range(size) if split == "train" else range(size, size + held_out):
            entry = made[i]
            if entry["answer"] is None or (split != "train" and entry["question"] in asked):
                continue
            question = entry["question"].strip()
            ids = dialogue.render_prompt([{"role": "user", "content": question}], vocabulary)
            texts = {"prompt": question, "question": entry["question"], "answer": str(entry["answer"])}
            yield {"inputs": np.array(ids, np.int32), **texts, "metadata": json.dumps(entry["metadata"], default=str)}

    def read(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
        shapes = {"inputs": tf.TensorSpec([None], tf.int32)} | {text: tf.TensorSpec([], tf.string) for text in FIELDS}
        return tf.data.Dataset.from_generator(lambda: entries(split), output_signature=shapes)

    splits = ["train", *(["validation"] if held_out else [])]
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits),
        output_features={"inputs": seqio.Feature(vocabulary, add_eos=False)},
    )


_NEEDED = (("reasoning_gym", "pip install tele_jax[align]"), ("seqio", None), ("tensorflow", None))
assert tasks.seqio  # its import makes our vocabularies count as those of seqio

"""Logits that are not finite numbers: generation says so and why, and draws nothing."""

import jax
import jax.numpy as jnp
import pytest

from tele_jax import checkpoint
from tele_jax.axes import flatten, unflatten
from tele_jax.cli.main import main
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import FailedError, UserError
from tele_jax.inference.chat import Chat
from tele_jax.inference.generate import generate, prepare, sampling
from tests.inference.test_chat import model, tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")


def broken(name, value, row=0):
    cfg, params = model()
    leaves = flatten(params)
    leaves[name] = leaves[name].at[(row, *[0] * (leaves[name].ndim - 1))].set(value)
    return cfg, unflatten(leaves)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("final_norm.scale", r"at position 0 are not finite numbers: the parameter final_norm.scale holds NaN"),
        ("layers.mlp.down", r"the parameter layers.mlp.down( of layer 0)? holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_a_parameter_that_is_no_number_is_named(name, message, options):
    cfg, params = broken(name, jnp.nan)
    heard = []
    with pytest.raises(FailedError, match=message):
        generate(cfg, params, [[1, 2], [3]], max_new_tokens=5, on_token=lambda *t: heard.append(t), **options)
    assert heard == []


def test_numbers_that_overflow_on_the_way():
    cfg, params = model(dtype="bfloat16")
    leaves = flatten(params)
    leaves["lm_head.kernel"] = leaves["lm_head.kernel"] * 3e38
    with pytest.raises(
        FailedError, match='though every parameter is one: numbers overflow in bfloat16; try dtype="float'
    ):
        generate(cfg, prepare(cfg, unflatten(leaves)), [[1, 2]], max_new_tokens=5)


def test_a_row_that_does_not_read_what_is_broken_is_as_before():
    cfg, params = broken("embed.table", jnp.nan, row=200)
    (good,) = generate(cfg, params, [[5, 6, 7]], max_new_tokens=4)
    assert [good] == generate(*model(), [[5, 6, 7]], max_new_tokens=4) and 200 not in good
    with pytest.raises(FailedError, match=r"at position 1 are not finite numbers: the parameter embed.table holds NaN"):
        generate(cfg, params, [[5, 6, 7], [3, 200]], max_new_tokens=4)


def test_chat_says_so_and_forgets_the_question(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    talk = Chat(*broken("final_norm.scale", jnp.inf), load_vocabulary(tmp_path / "tokenizer.model"))
    with pytest.raises(FailedError, match=r"final_norm.scale holds NaN or infinity"):
        talk.reply("The cat?")
    assert talk.messages == []


@pytest.mark.parametrize(
    "options",
    [
        *[dict(temperature="1"), dict(temperature=None), dict(temperature=True), dict(top_p="x"), dict(top_p=jnp.nan)],
        *[dict(top_k="5"), dict(top_k=2.5), dict(top_k=True)],
        *[dict(repetition_penalty="1"), dict(repetition_penalty=None)],
    ],
    ids=str,
)
def test_options_of_another_type(options):
    (name,) = options
    with pytest.raises(UserError, match=f"{name}="):
        sampling(**options)


def test_ids_and_lengths_of_another_type():
    cfg, params = model()
    for prompts, limit in (([[True]], 2), ([["1"]], 2), ([[1.0]], 2), ([[1]], True), ([[1]], "2"), ("1", 2)):
        with pytest.raises(UserError):
            generate(cfg, params, prompts, max_new_tokens=limit)
    assert jax.tree.leaves(params)


def test_the_command_ends_in_one_line_and_exit_code_1(tmp_path, capsys):
    checkpoint.save(tmp_path / "10", *broken("final_norm.scale", jnp.nan), step=10)
    (tmp_path / "10" / "tokenizer.model").write_bytes(tokenizer_bytes())
    for words in (["generate", "--prompt", "The"], ["chat", "--message", "The"]):
        assert main([words[0], str(tmp_path / "10"), *words[1:], "--max-new-tokens", "5"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("tele: the logits at position") and error.count("\n") == 1
        assert "final_norm.scale holds NaN or infinity" in error

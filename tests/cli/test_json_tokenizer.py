"""A run whose tokenizer is a JSON file and whose dialogues are written in a template by name, from data to chat."""

import json

import pytest

from tele_jax.cli.main import main
from tele_jax.data import domains
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.inference.chat import find_tokenizer
from tele_jax.settings import DataConfig, SourceConfig
from tests.data import caches
from tests.data.test_vocabulary_tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = """
from pathlib import Path
from ml_collections import ConfigDict

HERE = Path(__file__).parent

def get_config():
    source = dict(files=(str(HERE / "dialogues.jsonl"),), format="dialogues")
    data = dict(tokenizer=str(HERE / "released.json"), sources=dict(talk=source), template="telechat_52b")
    model = dict(num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=400, dtype="float32")
    config = ConfigDict()
    config.run = ("sft",)
    config.sft = dict(
        kind="sft", data=data, model=model, steps=2, batch_size=2, seq_len=64, optimizer=dict(learning_rate=1e-3)
    )
    return config
"""
GROWTH = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.model = dict(mlp_dim=32)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("json")
    dialogues = [
        {"messages": [{"role": "user", "content": f"第{i}?"}, {"role": "assistant", "content": f"答{i}."}]}
        for i in range(40)
    ]
    lines = [json.dumps(d, ensure_ascii=False) + "\n" for d in dialogues]
    (directory / "dialogues.jsonl").write_text("".join(lines))
    (directory / "released.json").write_text(json.dumps(byte_level(lines, 400)))
    (directory / "page.py").write_text(PAGE)
    (directory / "growth.py").write_text(GROWTH)
    return directory


def data(place, template):
    source = SourceConfig(files=(str(place / "dialogues.jsonl"),), format="dialogues")
    return DataConfig(tokenizer=str(place / "released.json"), sources={"talk": source}, template=template)


def test_fine_tuning_reads_dialogues_in_the_template(place):
    vocabulary = load_vocabulary(place / "released.json")
    batch = next(caches.open_feed(data(place, "telechat_52b"), kind="sft", seq_len=64, batch_size=2, seed=0))
    row = batch["tokens"][0][batch["segment_ids"][0] == 1]
    assert vocabulary.decode(row).startswith("<_user>第")
    learned = batch["targets"][0][(batch["segment_ids"][0] == 1) & (batch["loss_weights"][0] > 0)]
    assert learned[-1] == vocabulary.eos_id == 2
    assert vocabulary.decode(learned).startswith("答") and "<_" not in vocabulary.decode(learned)
    with pytest.raises(UserError, match="no piece '<_user>', so nothing says how dialogues are written"):
        domains.open_vocabulary(data(place, None), "sft")
    with pytest.raises(UserError, match="template 'other' is not one of"):
        domains.open_vocabulary(data(place, "other"), "sft")


def test_the_tokenizer_travels_with_the_checkpoints(place, capsys):
    workdir, grown = place / "W", place / "grown"
    released = (place / "released.json").read_bytes()
    assert main(["train", "--config", str(place / "page.py"), "--workdir", str(workdir)]) == 0
    assert (workdir / "tokenizer.json").read_bytes() == released
    assert not (workdir / "tokenizer.model").exists()
    assert find_tokenizer(workdir / "sft" / "checkpoints" / "2") == str(workdir / "tokenizer.json")
    assert main(["grow", str(workdir), str(grown), "--config", str(place / "growth.py")]) == 0
    assert (grown / "tokenizer.json").read_bytes() == released
    capsys.readouterr()
    chat = ["chat", str(grown), "--template", "telechat_52b", "--message", "第3?", "--max-new-tokens", "4"]
    assert main(chat) == 0
    assert capsys.readouterr().out.endswith("\n")

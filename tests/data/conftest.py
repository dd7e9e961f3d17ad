"""One small tokenizer for all tests here, trained on what Python brings along, and a vocabulary to count with."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tele_jax.data import vocabulary_training
from tele_jax.data.vocabulary import load_vocabulary

CHINESE = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。\n"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some 300 kB of real code and prose, and a line of Chinese."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted([*root.glob("json/*.py"), *root.glob("email/*.py")])
    return [text for file in files if (text := file.read_text(encoding="utf-8"))] + [CHINESE * 50]


@pytest.fixture(scope="session")
def model_file(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    trained = vocabulary_training.train_vocabulary(texts, preset="tele_flm", vocab_size=1000)
    vocabulary_training.write_vocabulary(trained, path, preset="tele_flm")
    return path


@pytest.fixture(scope="session")
def vocabulary(model_file):
    return load_vocabulary(model_file)


class Counting:
    """A vocabulary in which every token of a corpus is another one: the text "7:3" is the tokens 7000, 7001, 7002."""

    unk_id, bos_id, eos_id, pad_id = 0, 1, 2, 3
    user_id, bot_id, end_id, system_id = 10, 11, 12, 13
    vocab_size, extra_ids, sha256, spells_bytes, adds_dummy_prefix = 1_000_000, 0, "counting", True, False

    def encode(self, text: str) -> list[int]:
        first, _, count = text.partition(":")
        return [1000 * int(first) + k for k in range(int(count))]

    def encode_batch(self, texts, threads=1):
        return [np.array(self.encode(text), np.int32) for text in texts]


@pytest.fixture
def counting() -> Counting:
    return Counting()

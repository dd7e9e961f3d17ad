"""GRPO by two processes on one mesh: both draw the same replies, and one of them has them rewarded."""

import jax
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tests.align.test_rollout_feed import CFG, lines, place, rewards, table
from tests.multiprocess.test_run import Processes

__all__ = ["place", "rewards"]  # fixtures


pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_two_processes_learn_from_the_replies_of_one(place, rewards, tmp_path):
    page = {"run": ("rl",), "start": str(place / "start"), "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    page["rl"] = table(place, reward="counted", kl_coef=0.1, steps=5, checkpoint_every=3)
    config = tmp_path / "page.py"
    config.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({page!r})\n")
    with Processes(2, config, tmp_path / "2") as processes:
        outcomes = processes.wait()
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    tele.run(page, tmp_path / "1")
    one, two = (lines(tmp_path / name) for name in ("1", "2"))
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    samples = [(tmp_path / name / "rl" / "samples" / "0.jsonl").read_text() for name in ("1", "2")]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == 8
    # A reward that fails ends both, and the steps before it are saved.
    calls = (place / "calls").stat().st_size
    assert calls == 4 * 16, "only one process asks for rewards, twice in each run"
    (place / "after").write_text(f"raise {calls + 20}")
    with Processes(2, config, tmp_path / "failed") as processes:
        outcomes = processes.wait()
    assert [code for code, _ in outcomes] == [2, 2] and "no reward today" in outcomes[0][1], outcomes
    assert checkpoint.open_lazy(tmp_path / "failed").provenance[-1]["step"] == 4
    assert tele.count_params(CFG) == sum(leaf.size for leaf in jax.tree.leaves(checkpoint.load(tmp_path / "2").params))

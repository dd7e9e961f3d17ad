"""DPO by two processes, from the page that runs in small: what comes out is that of one process."""

import subprocess
import sys
from pathlib import Path

from tele_jax import checkpoint
from tele_jax.train import metrics
from tests.multiprocess.test_run import Processes

PAGE = Path(__file__).parents[2] / "configs" / "telechat2_align.py"
SMALLER = ["--config.sft.steps=3", "--config.dpo.steps=4", "--config.sft.log_every=1", "--config.dpo.log_every=1"]
SMALLER += [
    "--config.dpo.schedule.warmup=1",
    "--config.sft.schedule.warmup=1",
    "--config.mesh.data=8",
    "--config.dpo.reference=sft",
]


def test_two_processes_fine_tune_and_align_as_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, str(PAGE), "runs/telechat2_align"], check=True)
    pairs = (tmp_path / "runs" / "telechat2_align" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "telechat2_align" / "pairs.jsonl").write_text("".join(pairs[:200]))
    for count in (1, 2):
        with Processes(count, f"{PAGE}:toy", tmp_path / str(count), *SMALLER) as processes:
            outcomes = processes.wait()
        assert [code for code, _ in outcomes] == [0] * count, outcomes
    for stage in ("sft", "dpo"):
        one, two = (metrics.read(tmp_path / n / stage / "metrics" / "metrics.jsonl") for n in ("1", "2"))
        for ours, theirs in zip(two, one, strict=True):
            for name in theirs.keys() & {"loss", "grad_norm", "margin", "eval/margin/pairs"}:
                assert abs(ours[name] - theirs[name]) < 1e-4, (name, ours, theirs)
    assert checkpoint.load(tmp_path / "1" / "dpo").data_state == checkpoint.load(tmp_path / "2" / "dpo").data_state
    sizes = [sorted(f.stat().st_size for f in (tmp_path / n / "dpo" / "reference").iterdir()) for n in ("1", "2")]
    assert len(sizes[0]) == 2 and sizes[0] == sizes[1]

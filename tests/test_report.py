"""The report of a finished run: what its pictures are made from, and what is wrong with what it reads."""

import importlib.util
import json

import pytest

from tele_jax import report
from tele_jax.cli.main import main
from tele_jax.errors import DamageError
from tele_jax.report import runs

SUMMARIES = [
    {"stage": "small", "kind": "pretrain", "parameters": 1_500_000, "tokens": 3_000_000},
    {"stage": "grow", "kind": "grow", "parameters": 4_000_000, "receipt": {"max_abs": 1e-6, "policy": "exact"}},
    {"stage": "large", "kind": "pretrain", "parameters": 4_000_000, "tokens": 2_000_000},
]
METRICS = {
    "small": [
        {"step": 0, "eval/bits_per_byte/zh": 4.0, "eval/bits_per_byte/en": 5.0},
        {"step": 10, "loss": 3.0, "tokens": 1_500_000},
        {"step": 20, "loss": 2.5, "tokens": 3_000_000},
        {"step": 20, "eval/bits_per_byte/zh": 3.0, "eval/bits_per_byte/en": 3.5},
    ],
    "large": [{"step": 10, "loss": 2.0, "tokens": 2_000_000}, {"step": 10, "eval/bits_per_byte/en": 3.25}],
}


def write_run(directory, page, metrics=METRICS, summaries=SUMMARIES):
    """Writes config.json, the metrics and the summaries of a work directory."""
    (directory / "config.json").write_text(json.dumps({"run": list(page), **page}))
    for summary in summaries:
        stage = directory / summary["stage"]
        (stage / "metrics").mkdir(parents=True)
        lines = "".join(json.dumps(line) + "\n" for line in metrics.get(summary["stage"], ()))
        (stage / "metrics" / "metrics.jsonl").write_text(lines)
        (stage / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def workdir(tmp_path):
    write_run(tmp_path, {summary["stage"]: {"kind": summary["kind"]} for summary in SUMMARIES})
    receipt = {"layer_scores": [0.5, 0.2, 0.1, 0.3], "layers": [0, 1, 2, 2, 3]}
    (tmp_path / "grow" / "growth_receipt.json").write_text(json.dumps(receipt))
    return tmp_path


def test_the_curves_of_all_stages_lie_on_one_axis_of_tokens(workdir):
    panels, growths = runs.curves([runs.read(workdir, "run")], "tokens")
    assert growths == [3.0]
    assert panels == {
        "training loss, nats per token": {"small, 1.5M": ([1.5, 3.0], [3.0, 2.5]), "large, 4M": ([5.0], [2.0])},
        "held-out text, bits per byte": {"en": ([0.0, 3.0, 5.0], [5.0, 3.5, 3.25]), "zh": ([0.0, 3.0], [4.0, 3.0])},
    }


def test_a_branch_begins_where_the_stage_that_it_goes_on_from_ended(tmp_path):
    train, grow = {"kind": "pretrain"}, {"kind": "grow"}
    page = {"small": train, "large": train, "grow": grow | {"after": "small"}, "grown": train | {"after": None}}
    small, growth, large = SUMMARIES
    summaries = [small, large, growth, large | {"stage": "grown"}]
    write_run(tmp_path, page, METRICS | {"grown": METRICS["large"]}, summaries)
    panels, growths = runs.curves([runs.read(tmp_path, "run")], "tokens")
    assert growths == [3.0]
    loss = panels["training loss, nats per token"]
    assert loss["grown, 4M"] == loss["large, 4M"]
    assert panels["held-out text, bits per byte"]["en"] == ([0.0, 3.0, 5.0, 5.0], [5.0, 3.5, 3.25, 3.25])


def test_pictures_are_written_and_named(workdir):
    pytest.importorskip("matplotlib", reason="the extra [plots] is not installed")
    text = report.write(workdir, SUMMARIES)
    pictures = [workdir / "loss.png", workdir / "grow" / "layer_scores.png"]
    for picture in pictures:
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert str(picture) in text
    assert (workdir / "summary.txt").read_text() in text


def test_layers_that_were_not_chosen_by_distance_have_no_picture(workdir):
    pytest.importorskip("matplotlib", reason="the extra [plots] is not installed")
    (workdir / "grow" / "growth_receipt.json").write_text(json.dumps({"layer_scores": None, "layers": [0, 1, 2, 2, 3]}))
    assert "layer_scores" not in report.write(workdir, SUMMARIES)
    assert not (workdir / "grow" / "layer_scores.png").exists()


@pytest.mark.parametrize("content", [None, '{"layer_scores": [0.1'])
def test_a_damaged_receipt_is_named_after_the_table_is_written(workdir, content):
    pytest.importorskip("matplotlib", reason="the extra [plots] is not installed")
    receipt = workdir / "grow" / "growth_receipt.json"
    receipt.unlink() if content is None else receipt.write_text(content)
    with pytest.raises(DamageError, match=r"growth_receipt.json: (missing|damaged).*no picture of its layers"):
        report.write(workdir, SUMMARIES)
    assert "4,000,000" in (workdir / "summary.txt").read_text()


ROLLOUTS = [{"step": step, "loss": 0.1, "tokens": step * 100, "reward": step / 10, "kl": 0.01} for step in (5, 10)]


@pytest.fixture
def aligned(tmp_path):
    """A complete stage with evaluations of its own, and one under way that has written down sampled replies."""
    (tmp_path / "config.json").write_text(
        json.dumps({"run": ["dpo", "grpo", "later"], **{kind: {"kind": "grpo"} for kind in ("dpo", "grpo", "later")}})
    )
    summary = {"stage": "dpo", "kind": "dpo", "parameters": 1_000_000, "tokens": 500, "flops": 1e9}
    summary |= {"figures_before": {"accuracy/pairs": 0.5}, "figures_after": {"accuracy/pairs": 0.75}}
    for stage, lines in (("dpo", ROLLOUTS), ("grpo", ROLLOUTS)):
        (tmp_path / stage / "metrics").mkdir(parents=True)
        (tmp_path / stage / "metrics" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "dpo" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "grpo" / "samples").mkdir()
    for step, reward in ((5, 0.0), (10, 1.0)):
        reply = {"prompt": "1 + 1 =", "reply": f"{step}", "reward": reward}
        (tmp_path / "grpo" / "samples" / f"{step}.jsonl").write_text(json.dumps(reply) + "\n")
    return tmp_path


def test_a_run_under_way_is_shown_with_its_evaluations_and_its_latest_replies(aligned, capsys):
    assert main(["report", str(aligned)]) == 0
    said = capsys.readouterr().out
    assert "accuracy/pairs" in said and "0.500 -> 0.750" in said
    assert "stage grpo: at step 10" in said and "stage later: not begun" in said
    assert "reward 1  prompt  '1 + 1 ='" in said and "reply   '10'" in said and "reply   '5'" not in said
    if importlib.util.find_spec("matplotlib"):
        assert (aligned / "dpo" / "rollouts.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(aligned), "--samples", "0"]) == 0
    assert "reply" not in capsys.readouterr().out


def test_replies_are_lines_whatever_their_text_holds(aligned, capsys):
    """U+2028, U+0085 and others end a line for str.splitlines, and are no ends of a JSON line."""
    text = "a\u2028b\x85c\u2029d"
    replies = [{"prompt": text, "reply": text + str(i), "reward": i} for i in range(2)]
    samples = "".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
    (aligned / "grpo" / "samples" / "11.jsonl").write_text(samples, encoding="utf-8")
    (aligned / "grpo" / "samples" / "notes.jsonl").write_text("of the user")
    assert main(["report", str(aligned)]) == 0
    said = capsys.readouterr().out
    assert f"prompt  {text!r}" in said and f"reply   {text + '1'!r}" in said
    (aligned / "grpo" / "samples" / "11.jsonl").write_bytes(b"\xff\n")
    assert main(["report", str(aligned)]) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_what_is_no_run_or_damaged_is_named(aligned, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp("empty")
    assert main(["report", str(empty)]) == 2
    assert capsys.readouterr().err == (
        f"tele: {empty}: holds no run (no config.json); name the work directory of `tele train`\n"
    )
    assert main(["report", str(aligned), "--samples", "-1"]) == 2
    samples = aligned / "grpo" / "samples" / "10.jsonl"
    for text in ("{", '{"prompt": "x", "reply": "y"}', '{"prompt": "x", "reply": "y", "reward": "z"}', "[]"):
        samples.write_text(text + "\n")
        capsys.readouterr()
        assert main(["report", str(aligned)]) == 1
        assert str(samples) in capsys.readouterr().err

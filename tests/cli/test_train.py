"""`tele train` as a user runs it: a whole small run, kills in the middle of it, and wrong input."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.model import platforms
from tele_jax.train import metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = """
from pathlib import Path
from ml_collections import ConfigDict

HERE = Path(__file__).parent

def get_config():
    def data(domain, file_format):
        files = (str(HERE / f"{domain}.jsonl"),)
        held_out = (str(HERE / f"{domain}_held_out.jsonl"),)
        source = dict(files=files, validation_files=held_out, format=file_format)
        return dict(tokenizer=str(HERE / "tokenizer.model"), sources={domain: source}, eval_bytes=2000)

    shared = dict(batch_size=2, seq_len=32, log_every=4, checkpoint_every=4, optimizer=dict(learning_rate=3e-3))
    model = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=600)
    model = dict(model, dtype="float32", remat="none")
    config = ConfigDict()
    config.run = ("small", "grow", "large", "sft")
    config.small = dict(kind="pretrain", data=data("text", "jsonl"), steps=12, model=model, **shared)
    larger = dict(num_layers=3, embed_dim=24, num_heads=3, mlp_dim=37)
    config.grow = dict(kind="grow", policy="msg", layers="distance", model=larger)
    config.large = dict(kind="pretrain", data=data("text", "jsonl"), steps=12, mask_ramp=6, **shared)
    config.sft = dict(kind="sft", data=data("dialogues", "dialogues"), steps=8, **shared)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a page, its text and its tokenizer."""
    directory = tmp_path_factory.mktemp("run")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 8))) for _ in range(300)]
    text = [
        f"def {rng.choice(words)}_{i}(a):\n    return {' '.join(rng.choices(words, k=20))}  # 第{i}个\n"
        for i in range(400)
    ]
    dialogues = [
        {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(200)
    ]
    turns = ("user", "1+1?"), ("assistant", "2, as everybody knows.")
    dialogues.append({"messages": [{"role": role, "content": text} for role, text in turns * 4]})  # longer than a row
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in text))
    (directory / "dialogues.jsonl").write_text("".join(json.dumps(d) + "\n" for d in dialogues))
    for name in ("text", "dialogues"):  # the same documents in another order, so that little training shows
        lines = (directory / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (directory / f"{name}_held_out.jsonl").write_text("".join(reversed(lines)))
    (directory / "page.py").write_text(PAGE)
    arguments = ["tokenizer", "train", "--preset", "tele_flm", "--vocab-size", "480", "--out"]
    assert main([*arguments, str(directory / "tokenizer.model"), str(directory / "text.jsonl")]) == 0
    return directory


@pytest.fixture(scope="module")
def finished(place):
    """The work directory of a run that nothing disturbed."""
    workdir, figures = place / "undisturbed", str(place / "out.json")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", "--config", str(place / "page.py"), "--workdir", str(workdir), "--json", figures]) == 0
    (place / "said.txt").write_text(said.getvalue())
    return workdir


def test_a_run_trains_grows_and_reports(place, finished, capsys):
    stages = {s["stage"]: s for s in json.loads((place / "out.json").read_text())["stages"]}
    assert list(stages) == ["small", "grow", "large", "sft"]
    receipt = json.loads((finished / "grow" / "growth_receipt.json").read_text())
    assert receipt["ok"] and receipt["max_abs"] <= 1e-4
    before, after = stages["small"]["bits_per_byte_after"], stages["large"]["bits_per_byte_before"]
    # Behind masks at 0 the grown model is the small one, also on text it is evaluated on.
    assert after["text"] == pytest.approx(before["text"], abs=1e-4)
    for name in ("small", "large", "sft"):
        stage = stages[name]
        domain = "dialogues" if name == "sft" else "text"
        assert stage["bits_per_byte_after"][domain] < stage["bits_per_byte_before"][domain]
    for picture in (finished / "loss.png", finished / "grow" / "layer_scores.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = (finished / "summary.txt").read_text()
    assert "max logit difference" in table and f"{stages['large']['parameters']:,}" in table
    lines = metrics.read(finished / "large" / "metrics" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= lines[1].keys()
    assert list((finished / "large" / "metrics").glob("events.out.tfevents.*"))
    provenance = checkpoint.open_lazy(finished).provenance
    assert [entry["stage"] for entry in provenance] == ["small", "grow", "large", "sft"]
    assert provenance[-1]["step"] == 8
    # The second stage on the same text goes on where the first one ended, through the growth between them.
    small, _, large, sft = (entry.get("data", {}).get("positions", {}) for entry in provenance)
    assert large["text"]["checksum"] == small["text"]["checksum"] and large["text"]["next"] > small["text"]["next"]
    assert sft.keys() == {"dialogues"}
    long = "sources.dialogues.files: 1 dialogues were longer than a row and were split at turns"
    assert (place / "said.txt").read_text().count(long) == 1


def test_only_a_process_of_its_own_keeps_freed_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(platforms, "keep_freed", lambda: asked.append(True))  # it would hold for all tests that follow
    argv = ["train", "--config", "not/there.py", "--workdir", "not/there"]
    assert main(argv) == 2 and not asked
    monkeypatch.setattr(sys, "argv", ["tele", *argv])
    assert main() == 2 and asked


def test_a_finished_run_does_nothing_again(place, finished, capsys):
    stamp = {path: path.stat().st_mtime_ns for path in finished.rglob("checkpoints/*")}
    assert main(["train", "--config", str(place / "page.py"), "--workdir", str(finished)]) == 0
    assert "max logit difference" in capsys.readouterr().out
    assert stamp == {path: path.stat().st_mtime_ns for path in finished.rglob("checkpoints/*")}


def start(place, workdir):
    command = [
        sys.executable,
        "-m",
        "tele_jax.cli.main",
        "train",
        "--config",
        str(place / "page.py"),
        "--workdir",
        str(workdir),
    ]
    environment = {**os.environ, "NPROC": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(process, workdir, name):
    """Until a file of the run is there; False where the run ended before."""
    while not (workdir / name).exists():
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def asked_to_stop(place, workdir, which, code):
    """A start that gets a signal in its first stage, and saves where it stands: at the step that it returns."""
    process = start(place, workdir)
    assert wait_for(process, workdir, "small/checkpoints/4"), process.stdout.read()
    process.send_signal(which)
    output = process.communicate()[0]
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came; give it more steps")
    assert process.returncode == code, output
    assert "which is saved; start again to go on" in output and "Traceback" not in output
    step = int(re.search(r"stopped at step (\d+) of 12", output)[1])
    lazy = checkpoint.open_lazy(workdir)
    assert lazy.step == step and lazy.opt_state is not None
    return step


def test_asked_to_stop_and_killed_on_the_way_it_finishes_with_the_same_parameters(place, finished):
    """By SIGTERM in training, by SIGKILL in a growth and behind masks."""
    workdir, rng = place / "killed", random.Random(0)
    stopped = asked_to_stop(place, workdir, signal.SIGTERM, 143)
    kept = {}
    for mark in ("grow/growth_receipt.json", "large/checkpoints/4"):
        process = start(place, workdir)
        assert wait_for(process, workdir, mark), process.stdout.read()
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
        done = {path: path.read_bytes() for path in workdir.glob("*/summary.json")}
        assert kept.items() <= done.items()  # what was finished stays
        kept = done
    process = start(place, workdir)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    got, expected = (flatten(checkpoint.load(w).params) for w in (workdir, finished))
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(value), rtol=0, atol=1e-5, err_msg=name)
    for stage in ("small", "large"):
        ours, theirs = (metrics.read(w / stage / "metrics" / "metrics.jsonl") for w in (workdir, finished))
        steps = [[line["step"] for line in lines if "loss" in line] for lines in (ours, theirs)]
        asked = {stopped} if stage == "small" else set()  # which has a line of its own
        assert steps[0] == sorted({*steps[1], *asked})  # no line lost, none twice


def test_ctrl_c_saves_where_it_stands(place, tmp_path):
    asked_to_stop(place, tmp_path / "stopped", signal.SIGINT, 130)


MASKS_IN_TURN = [
    "--config.large.mask_unit='tokens'",  # 64 a step
    "--config.large.mask_start=100",
    "--config.large.mask_ramp=130",
    "--config.large.mask_order=('mlp','layers','embed','heads')",
    "--config.large.optimizer.new_warmup_steps=3",
]


def test_stopped_while_masks_rise_one_after_another_it_goes_on_exactly(place, finished, capsys, tmp_path):
    workdir = tmp_path / "in_turn"
    for stage in ("small", "grow"):  # as they are there
        shutil.copytree(finished / stage, workdir / stage)
    shutil.copyfile(finished / "config.json", workdir / "config.json")  # what has not begun may change
    page = tmp_path / "page.py"
    text = PAGE.replace("Path(__file__).parent", repr(place)).replace("PosixPath", "Path")
    page.write_text(text.replace("return config", "config.run = config.run[:3]\n    del config.sft\n    return config"))
    arguments = ["train", "--config", str(page), "--workdir", str(workdir), *MASKS_IN_TURN]
    assert main(arguments) == 0
    large, copy = workdir / "large", tmp_path / "undisturbed"
    shutil.copytree(large, copy)
    # What a kill after step 8 leaves: its checkpoint, behind masks of which the last has begun to rise.
    shutil.rmtree(large / "checkpoints" / "12")
    (large / "summary.json").unlink()
    assert checkpoint.open_lazy(large).step == 8
    provenance = checkpoint.open_lazy(large).provenance
    assert provenance[-1]["mask"] == pytest.approx((8 * 64 - 100 - 3 * 130) / 130)
    assert "masks that stand at 0.16" in fails(capsys, 2, "generate", str(large), "--prompt", "def")
    assert main(arguments) == 0
    resumed, undisturbed = checkpoint.load(large), checkpoint.load(copy)
    assert resumed.step == undisturbed.step == 12 and resumed.provenance[-1]["mask"] is None
    for ours, theirs in ((resumed.params, undisturbed.params), (resumed.opt_state, undisturbed.opt_state)):
        for got, expected in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    # Growth came after 12 steps of the small model; the masks leave these axes 2, 4, 6 and 8 steps without gradient.
    born = {path.split("born.")[1]: b for path, b in flatten(resumed.opt_state).items() if "born." in path}
    assert {axis: int(np.asarray(b).max()) for axis, b in born.items()} == {
        **{"mlp": 14, "layers": 16, "embed": 18, "heads": 20, "kv_heads": 20},
        **{"vocab": 0, "head_dim": 0},
    }
    lines = [metrics.read(d / "metrics" / "metrics.jsonl") for d in (large, copy)]
    figures = [[(x["step"], x.get("loss"), x.get("eval/bits_per_byte/text")) for x in each] for each in lines]
    assert figures[0] == figures[1]


def fails(capsys, code, *arguments):
    """Exit code, and the one line that it says."""
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def test_a_run_starts_from_a_checkpoint_that_is_there(place, finished, tmp_path, capsys):
    """Growth first, of what another run left, then training on; as with a model that was imported."""
    page, workdir = tmp_path / "page.py", tmp_path / "w"
    text = PAGE.replace("Path(__file__).parent", repr(place)).replace("PosixPath", "Path")
    page.write_text(
        text.replace('("small", "grow", "large", "sft")', '("grow", "large")')
        .replace("    config.small =", "    small =")
        .replace("    config.sft =", "    sft =")
    )
    start = f"--config.start={str(finished / 'small')!r}"
    assert main(["train", "--config", str(page), "--workdir", str(workdir), start]) == 0
    grown = checkpoint.open_lazy(workdir)
    assert [entry["stage"] for entry in grown.provenance] == ["small", "grow", "large"]
    assert grown.cfg.embed_dim == 24 and grown.opt_state is not None
    before, after = (grown.provenance[i]["data"]["positions"]["text"]["next"] for i in (0, 2))
    assert after > before, "the data goes on where the other run left it, through the growth"
    capsys.readouterr()
    line = fails(capsys, 2, "train", "--config", str(page), "--workdir", str(workdir))
    assert "there is nothing to grow yet; config.start names a checkpoint" in line
    behind_masks = f"--config.start={str(finished / 'grow')!r}"
    line = fails(capsys, 2, "train", "--config", str(page), "--workdir", str(tmp_path / "v"), behind_masks)
    assert "grown behind masks" in line
    elsewhere = f"--config.start={str(tmp_path / 'nowhere')!r}"
    assert "nowhere" in fails(capsys, 2, "train", "--config", str(page), "--workdir", str(tmp_path / "v"), elsewhere)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.small.stepz=5", "config.small.stepz: unknown key of PretrainStage; did you mean 'steps'?"),
        ("--config.smal.steps=5", "the page has no table config.smal; did you mean 'small'?"),
        ("--config.small.model.num_kv_heads=3", "num_heads=2 does not divide into num_kv_heads=3"),
        ("--config.small.model.head_dim=7", "head_dim=7 must be even"),
        ("--config.small.seq_len=9999", "seq_len=9999 is above the model's max_seq_len=4096"),
        ("--config.grow.model.rope={'theta': 5e5}", "rope differs"),
        ("--config.run=5", "config.run: expected a list, got 5"),
        ("--config.mesh={'fsdp': 3}", "does not divide over mesh"),
        ("--config.small.model.vocab_size=300", "the tokenizer has 480 ids, but the model's vocab_size is 300"),
        (
            "--config.grow.policy='nothing'",
            "config.grow grows by policy 'nothing', and only growth by policy 'msg' has masks",
        ),
        (
            "--config.large.mask_order=('mlp','vocab')",
            "config.large.mask_order: ('mlp', 'vocab') is neither 'together' nor a list of the axes that grow behind "
            "masks, each once: embed, mlp, heads, layers",
        ),
        ("--config.large.mask_order='mlp'", "mask_order='mlp' is neither 'together' nor a list of axes"),
        (
            "--config.large.mask_unit='hours'",
            "config.large.mask_unit: 'hours' is not one of 'steps', 'tokens'",
        ),
        (
            "--config.large.mask_order=('mlp','layers','embed','heads')",
            "config.large: the mask ramp ends after the last step: at 24 steps, but the stage has 12",
        ),
        ("--config.small.data.tokenizer='nowhere.model'", "nowhere.model"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(place, capsys, tmp_path, override, expected):
    workdir = tmp_path / "w"
    line = fails(capsys, 2, "train", "--config", str(place / "page.py"), "--workdir", str(workdir), override)
    assert expected in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "text.jsonl"),
        (b"", "empty"),
        (b'{"text": "caf\xe9"}\n', "not one document can be used; the first is"),
    ],
)
def test_bad_text_is_refused_in_one_line(place, capsys, tmp_path, content, expected):
    page = tmp_path / "page.py"
    page.write_text(PAGE.replace("Path(__file__).parent", repr(place)).replace("PosixPath", "Path"))
    file = tmp_path / "text.jsonl"
    if content is not None:
        file.write_bytes(content)
    override = f"--config.small.data.sources.text.files=({str(file)!r},)"
    assert expected in fails(capsys, 2, "train", "--config", str(page), "--workdir", str(tmp_path / "w"), override)
    assert not (tmp_path / "w").exists(), "nothing was begun"


def test_lines_that_cannot_be_used_are_kept_aside_and_training_goes_on(place, capsys, tmp_path):
    lines = (place / "text.jsonl").read_bytes().splitlines(keepends=True)
    file, held_out = tmp_path / "text.jsonl", tmp_path / "held_out.jsonl"
    for path, rest in ((file, lines[20:]), (held_out, lines[:19:-1])):
        path.write_bytes(b"".join([*lines[:20], b'{"text": "caf\xe9"}\n', *rest, b"no JSON\n"]))
    text = PAGE.replace("Path(__file__).parent", repr(place)).replace("PosixPath", "Path")
    text = text.replace('("small", "grow", "large", "sft")', '("small",)').replace("steps=12", "steps=2")
    for name in ("grow", "large", "sft"):
        text = text.replace(f"config.{name} =", f"{name} =")
    page, workdir = tmp_path / "page.py", tmp_path / "w"
    page.write_text(text)
    files = {"files": file, "validation_files": held_out}
    overrides = [f"--config.small.data.sources.text.{n}=({str(path)!r},)" for n, path in files.items()]
    command = ["train", "--config", str(page), "--workdir", str(workdir), *overrides]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("sources.text.files: 400 documents are held out as well") == 1
    said = [line for line in out.splitlines() if "cannot be used" in line]
    for line, field in zip(said, files, strict=True):
        aside = workdir / "small" / "rejected" / f"text.{field}.jsonl"
        assert line == (
            f"  sources.text.{field}: 2 of 402 documents cannot be used; the first is {files[field]}, line 21: "
            f"not UTF-8 at byte {len(b''.join(lines[:20])) + 13} (0xe9); all are in {aside}"
        )
        entries = [json.loads(line) for line in aside.read_text().splitlines()]
        assert [(e["line"], e["sample"]) for e in entries] == [(21, '{"text": "caf\\xe9"}\n'), (402, "no JSON\n")]
    assert checkpoint.open_lazy(workdir).step == 2
    # A start that is refused, for a file that was mended meanwhile, leaves what the run was trained without.
    (workdir / "small" / "summary.json").unlink()
    kept = {path: path.read_bytes() for path in (workdir / "small").rglob("*") if path.is_file()}
    file.write_bytes(b"".join(lines))
    assert "saved for another feed: sources.text.checksum was" in fails(capsys, 2, *command)
    assert {path: path.read_bytes() for path in (workdir / "small").rglob("*") if path.is_file()} == kept


def test_text_that_is_trained_on_cannot_be_held_out(place, capsys, tmp_path):
    copy = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(place / "text.jsonl", copy)
    (tmp_path / "link.jsonl").symlink_to(place / "text.jsonl")
    for path in (place / "text.jsonl", tmp_path / "link.jsonl", copy):
        flag = f"--config.small.data.sources.text.validation_files=({str(path)!r},)"
        command = ["train", "--config", str(place / "page.py"), "--workdir", str(tmp_path / "w"), flag]
        assert f"{path} is trained on as well (sources.text.files" in fails(capsys, 2, *command)
    assert not (tmp_path / "w").exists()


def test_another_config_in_the_same_work_directory_is_refused(place, finished, capsys):
    line = fails(
        capsys, 2, "train", "--config", str(place / "page.py"), "--workdir", str(finished), "--config.small.steps=13"
    )
    assert "config.small.steps was 12, is 13" in line and "another work directory" in line


def test_a_work_directory_from_before_a_field_existed_is_taken_with_its_default(place, finished, capsys, tmp_path):
    workdir = tmp_path / "older"
    shutil.copytree(finished, workdir)
    stored = json.loads((workdir / "config.json").read_text())
    del stored["start"], stored["large"]["mask_shape"]
    (workdir / "config.json").write_text(json.dumps(stored))
    assert main(["train", "--config", str(place / "page.py"), "--workdir", str(workdir)]) == 0
    line = fails(
        capsys,
        2,
        *("train", "--config", str(place / "page.py"), "--workdir", str(workdir), "--config.large.mask_shape=cosine"),
    )
    assert "config.large.mask_shape was 'linear', is 'cosine'" in line


def test_a_damaged_checkpoint_is_named_and_left_alone(place, finished, capsys, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished, workdir)
    (workdir / "sft" / "summary.json").unlink()
    shutil.rmtree(workdir / "sft" / "checkpoints")
    chunk = next(
        path
        for path in (workdir / "large" / "checkpoints" / "12" / "params" / "embed.table" / "c").rglob("*")
        if path.is_file()
    )
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    line = fails(capsys, 1, "train", "--config", str(place / "page.py"), "--workdir", str(workdir))
    assert "embed.table" in line and "damaged" in line
    assert chunk.read_bytes() == bytes(content)


def test_a_model_behind_masks_does_not_talk(place, finished, capsys):
    line = fails(capsys, 2, "chat", str(finished / "grow"), "--message", "1+1?")
    assert "masks that stand at 0.00" in line


def test_growing_from_the_command_line(place, finished, capsys, tmp_path):
    page = tmp_path / "grow.py"
    page.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(model=dict(embed_dim=31, num_heads=5, mlp_dim=50, num_layers=4)))\n"
    )
    destination = tmp_path / "big"
    arguments = [
        "grow",
        str(finished / "large"),
        str(destination),
        "--config",
        str(page),
        "--opt",
        "--layers",
        "0,1,1,2",
    ]
    assert main([*arguments, "--json", str(tmp_path / "receipt.json")]) == 0
    assert "preserves the function" in capsys.readouterr().out
    receipt = json.loads((destination / "growth_receipt.json").read_text())
    assert receipt["ok"] and receipt["max_rel"] < 2e-5 and receipt["layers"] == [0, 1, 1, 2]
    loaded = checkpoint.load(destination)
    assert loaded.cfg.embed_dim == 31 and loaded.opt_state is not None
    assert loaded.cfg.rms_eps == pytest.approx(1e-5 * 24 / 31)
    assert loaded.provenance[-2]["data"]["positions"]["text"]["next"] > 0, (
        "by which a run from here goes on in its data"
    )
    assert "exists already" in fails(capsys, 2, *arguments)
    behind_masks = ["grow", str(finished / "grow"), str(tmp_path / "other"), *arguments[3:]]
    assert "masks that stand at 0.00" in fails(capsys, 2, *behind_masks)
    shrunk = [*arguments[:2], str(tmp_path / "small"), *arguments[3:6], "--config.model.embed_dim=8"]
    assert "would shrink, 24 -> 8" in fails(capsys, 2, *shrunk)
    assert not (tmp_path / "small").exists()

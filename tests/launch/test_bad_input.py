"""What a user may get wrong: one clear line, exit code 2, and nothing asked of the cloud."""

import os

import pytest
from jax.sharding import AbstractMesh

from tele_jax.cli import preflight
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.sharding import MESH_AXES
from tele_jax.stages import run_config
from tests.launch.launchers import AT, PAGE, ROOT, TRAIN, calls, launch, stand_ins

OPTIONS = ["--topology", "v5p:4x4x8", "--bucket", "gs://my-bucket", "--checkout", str(ROOT)]
DATAFLOW = ["--api", "dataflow", *OPTIONS[2:]]
CLEAN = ["tele", "data", "clean", "--config", str(ROOT / "configs/data/clean_web.py")]
LAUNCHERS = sorted({file.name for file in (ROOT / "launch").glob("*.sh")} - {"lib.sh", "worker.sh"})
ON = [str(ROOT / word) if word == PAGE else word for word in TRAIN]


def with_(options: list[str], **changes: str) -> list[str]:
    options = list(options)
    for name, value in changes.items():
        options[options.index(f"--{name}") + 1] = value
    return options


@pytest.mark.parametrize(
    "options, command, says",
    [
        (with_(OPTIONS, topology="v9:4x4"), ON, "topology 'v9:4x4': not known; known are v4:4x4x8, v5e:16x16"),
        (with_(OPTIONS, topology="v5p:4x8x8"), ON, "fsdp=64 x tensor=2 = 128 devices, but v5p:4x8x8 has 256"),
        ([*OPTIONS, "--num-slices", "2"], [*ON, "--config.mesh.fsdp=128"], "config.num_slices=1, but --num-slices 2"),
        (OPTIONS, [*ON, "--num-processes", "1"], "--num-processes: leave it out"),
        (OPTIONS, [*ON, "--config.pretrain.seq_len=8192"], "seq_len=8192 is above the model's max_seq_len=4096"),
        (OPTIONS, [*ON, "--config.mesh.fsdp=1", "--config.mesh.tensor=128"], "heads=64 does not divide over mesh"),
        (OPTIONS, [*ON, "--config.pretrain.microbatches=42"], "batch_size=32 (per microbatch) does not divide"),
        ([*with_(OPTIONS, topology="tpu7x:4x4x4"), "--api", "tpu"], ON, "the Cloud TPU API has no tpu7x; launch/gke"),
        ([*with_(OPTIONS, topology="v5p:4x4x16"), "--api", "tpu"], [*ON, "--config.mesh.tensor=4"], "a slice of 4x8x8"),
        (with_(OPTIONS, bucket="my-bucket"), ON, "--bucket my-bucket: no bucket; it looks like gs://my-bucket"),
        (with_(OPTIONS, bucket="gs://my-bucket/runs"), ON, "without a path behind it"),
        (with_(OPTIONS, checkout=str(ROOT / "tests")), ON, "is outside"),
        (OPTIONS, with_(ON, config="configs/none.py"), "--config configs/none.py: no such file"),
        (OPTIONS, with_(ON, workdir="/else/run"), "--workdir=/else/run: the machines see the bucket as their current"),
        (OPTIONS, [*ON, "--config.pretrain.data.tokenizer=../t.model"], "data.tokenizer=../t.model: the machines"),
        (OPTIONS, [*ON, "--config.pretrain.stepz=3"], "stepz"),
        (OPTIONS, ["tele", "train", "--wordir", "W"], "tele: train: unrecognized argument --wordir; did you mean"),
        (OPTIONS, ["python", "train.py"], "-- python: the command begins with tele"),
        (OPTIONS, ["tele", "grow", "a", "b"], "tele grow: uses no slice; it runs on one machine: launch/cpu_vm.sh"),
        (OPTIONS[2:], ON, "tele train: trains on a slice; give --topology"),
        (DATAFLOW, [*CLEAN, "--out", "gs://b/x"], "'quality' opens runs/web/quality.npz on every worker"),
        (DATAFLOW, [*CLEAN, "--out", "x", "--config.stages=('extract','language')"], "Dataflow reads and writes"),
    ],
)  # fmt: skip
def test_preflight_says_what_is_wrong(options, command, says, capsys):
    code = main(["preflight", *options, "--", *command])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_branch_is_checked_on_the_stage_that_it_goes_on_from():
    """10 heads divide over the 2 key-value heads of `small`, and not over the 4 of `other`, right before it."""
    data = {"tokenizer": "t.model", "sources": {"en": {"files": ["en.jsonl"]}}}
    stage = dict(kind="pretrain", data=data, steps=20, batch_size=2, seq_len=8, optimizer={"learning_rate": 0.1})
    model, grow = dict(num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=2, mlp_dim=12), dict(kind="grow")
    page = {
        "run": ["small", "grow", "other", "wide", "large"],
        "small": stage | {"model": model | dict(vocab_size=32)},
        "grow": grow | {"model": dict(num_heads=8, num_kv_heads=4)},
        "other": stage,
        "wide": grow | {"model": dict(num_heads=10), "after": "small"},
        "large": stage,
    }
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES)
    assert preflight._fits(run_config(page), mesh) == ["t.model", "en.jsonl"] * 3
    del page["wide"]["after"]
    with pytest.raises(UserError, match=r"config\.wide: .*num_kv_heads=4"):
        preflight._fits(run_config(page), mesh)


@pytest.mark.parametrize(
    "script, words, says",
    [
        ("tpu_vm.sh", [*AT, "--topology", "v5p:4x4x8", "--spott", "--", *TRAIN], "--spott: there is no such option"),
        ("xpk.sh", [*AT, "--topology", "v5p:4x4x8", "--", *TRAIN], "--cluster: missing"),
        ("cpu_vm.sh", AT, "the command is missing"),
        ("queued_resources.sh", [*AT, "--topology"], "--topology: needs a value"),
        ("tpu_vm.sh", [*AT, "--topology", "v4-8", "--name", "Tele", "--", *TRAIN], "--name Tele: give 2 to 39 of a-z"),
        ("dataflow.sh", [*AT[:4], "--region", "r", "--project", "p", "--image", "i", "--", *TRAIN], "only tele data"),
    ],
)  # fmt: skip
def test_a_launcher_says_what_is_wrong_with_its_options(script, words, says, tmp_path):
    done = launch(script, *words, env=stand_ins(tmp_path, []))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: ") and says in done.stderr
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    "script, missing, how",
    [
        ("tpu_vm.sh", "gcloud", "cloud.google.com/sdk/docs/install"),
        ("gke_jobset.sh", "kubectl", "gcloud components install kubectl"),
        ("xpk.sh", "xpk", "pip install xpk"),
    ],
)
def test_a_program_that_is_missing(script, missing, how, tmp_path):
    """Nothing on the PATH but what the shell itself needs, and stand-ins for the others."""
    for program in ("bash", "basename", "dirname", "sed", "git"):
        (tmp_path / program).symlink_to(os.path.realpath(os.popen(f"command -v {program}").read().strip()))
    stand_ins(tmp_path, [], [name for name in ("gcloud", "kubectl", "xpk", "docker") if name != missing])
    words = [*AT, "--topology", "v5p:4x4x8", "--", *TRAIN]
    extra = {"gke_jobset.sh": ["--image", "i"], "xpk.sh": ["--image", "i", "--cluster", "c"]}.get(script, [])
    if script == "gke_jobset.sh":
        words = [word for word in words if word not in ("--zone", "us-east5-a")]
    done = launch(script, *extra, *words, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: {missing} is missing") and how in done.stderr
    assert calls(tmp_path) == []


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_tells_every_option(script):
    done = launch(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = (ROOT / "launch" / script).read_text()
    added = " ".join(part.split('"')[0] for part in text.split('+="')[1:3]).split()
    for option in ["name", "bucket", "dry-run", *added]:
        assert f"--{option}" in done.stdout, option


def test_a_page_that_git_does_not_track(tmp_path):
    """The machines get what git tracks: a page that is not would be missing there."""
    page = ROOT / "tests" / "launch" / "untracked_page.py"
    page.write_text((ROOT / PAGE).read_text())
    try:
        words = with_(TRAIN, config=str(page.relative_to(ROOT)))
        done = launch("tpu_vm.sh", "--dry-run", *AT, "--topology", "v5p:4x4x8", "--", *words)
    finally:
        page.unlink()
    assert done.returncode == 2
    assert "git add tests/launch/untracked_page.py" in done.stderr

"""Every command of launch/README.md, dry: what is printed is read by those it is meant for, and nothing was done."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tele_jax.aot.topology import find_slice, gke_names, tpu_api_names
from tele_jax.cli import main
from tele_jax.cli.pages import load_page
from tele_jax.settings import cache_config
from tele_jax.stages import run_config
from tests.launch.launchers import CODE, ROOT, commands, dry_run, readme_commands, tele_command

CASES = list(readme_commands())
# One dry run of each launcher; commands that differ in their page and mesh alone go through the preflight below.
DRY = list({case.split()[0]: case for case in reversed(CASES)}.values())


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_readme_shows_every_launcher():
    launchers = {file.name for file in (ROOT / "launch").glob("*.sh")} - {"lib.sh", "worker.sh"}
    assert {case.split()[0] for case in CASES} == launchers
    assert len(DRY) == len(launchers)


@pytest.mark.parametrize("case", [case for case in CASES if case not in DRY])
def test_the_other_commands_pass_the_preflight(case, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = readme_commands()[case]
    split = words.index("--")
    options = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--bucket", "--topology"):
        options.add_argument(name)
    given, _ = options.parse_known_args(words[1:split])
    slice_ = [] if given.topology is None else ["--topology", given.topology]
    assert main.main(["preflight", "--checkout", str(ROOT), "--bucket", given.bucket, *slice_, *words[split:]]) == 0
    page = words[words.index("--config") + 1]
    assert f"--config {CODE}/{page}" in capsys.readouterr().out


SERIES = [case for case in CASES if any("tele_flm_series.py:" in word for word in readme_commands()[case])]


def test_the_readme_runs_every_part_of_the_series():
    pages = {word for case in SERIES for word in readme_commands()[case] if "tele_flm_series.py:" in word}
    assert {page.partition(":")[2] for page in pages} == {"52b", "102b", "1t"}


@pytest.mark.parametrize("case", SERIES)
def test_the_parts_of_the_series_have_the_settings_of_the_plan_for_their_slices(case):
    words = readme_commands()[case]
    topology, page = (words[words.index(flag) + 1] for flag in ("--topology", "--config"))
    part = page.partition(":")[2]
    config = run_config(load_page(f"{ROOT}/{page}", [word for word in words if word.startswith("--config.")]))
    lines = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").replace(" * |", " |").splitlines()
    rows = [line for line in lines if line.startswith(f"| tele_flm_{part} | {topology} ")]
    assert rows, f"docs/scale.md has no row of tele_flm_{part} on {topology}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in vars(config.mesh).items() if size > 1)
    stage = config.stages[config.run[-1]]
    model = config.stages[config.run[0]].model  # of a growth, the fields that change
    remat = model["remat"] if isinstance(model, dict) else model.remat
    settings = f"| {mesh} | {stage.batch_size:,} x {stage.microbatches} | {remat} |"
    assert any(settings in row for row in rows), (settings, rows)


def test_shellcheck_finds_nothing():
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "launch").glob("*.sh"))]
    done = subprocess.run([tool("shellcheck"), "-x", *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", DRY)
def test_our_own_command_reads_what_the_machines_will_run(case):
    words = tele_command(dry_run(case))
    module, args = main.parse(words[1:])
    assert module.__name__ == f"tele_jax.cli.{words[1]}"
    # The page is where the copy of the checkout will be; here is the checkout.
    page = load_page(args.config.replace(CODE, str(ROOT)), args.overrides)
    asked = readme_commands()[case]
    asked = asked[asked.index("--", 1) + 1 :]
    assert [word.replace(f"{CODE}/", "") for word in words[: len(asked)]] == asked
    if args.verb == "train":
        config = run_config(page)
        for override in args.overrides:
            name, _, value = override.removeprefix("--config.").partition("=")
            assert name.startswith("mesh.") or name.split(".")[0] in config.stages
            if name.startswith("mesh."):
                assert getattr(config.mesh, name.removeprefix("mesh.")) == int(value)
    elif args.verb == "grow":
        assert args.stage in page
    elif args.action == "cache":
        cache_config(page)


@pytest.mark.parametrize("case", DRY)
def test_nothing_is_created_before_everything_was_looked_at(case):
    lines = [" ".join(words) for words in commands(dry_run(case))]
    looks = [i for i, line in enumerate(lines) if any(w in line for w in (" auth list", " describe ", "storage ls "))]
    changes = [
        i
        for i, line in enumerate(lines)
        if any(w in line for w in (" create ", " apply ", " push ", " cp ", " attach ", "DataflowRunner"))
    ]
    assert any("buckets describe gs://" in line for line in lines)
    first_create = next(i for i in changes if " cp " not in lines[i])
    assert all(look < first_create for look in looks)


def test_gcloud_reads_the_command_lines_that_create_something(tmp_path):
    program = tool("gcloud")
    lines = [shlex.join(words) for case in DRY for words in commands(dry_run(case)) if words[0] == "gcloud"]
    # One of each kind: gcloud takes a second for a line.
    kinds = (
        "tpu-vm create",
        "tpu-vm ssh",
        "queued-resources create",
        "instances create",
        "storage cp",
        "buckets describe",
    )
    chosen = [next(line for line in lines if kind in line) for kind in kinds]
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": line} for line in chosen]))
    asked = [program, "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"]
    results = json.loads(subprocess.run(asked, capture_output=True, text=True).stdout)
    assert [(r["success"], r["error_message"]) for r in results] == [(True, None)] * len(kinds)


def test_xpk_reads_its_command_lines_and_means_the_same_slice():
    parser = pytest.importorskip("xpk.parser.core", reason="xpk is not installed")
    system = pytest.importorskip("xpk.core.system_characteristics", reason="xpk is not installed")
    (case,) = (case for case in CASES if case.startswith("xpk.sh"))
    for words in commands(dry_run(case)):
        if words[0] == "xpk":
            xpk = argparse.ArgumentParser()
            parser.set_parser(xpk)
            xpk.parse_args(words[1:])
    for name in ("v4:4x4x8", "v5e:16x16", "v5p:4x4x8", "v5p:8x16x16", "v5p:16x16x24", "v6e:16x16", "tpu7x:8x16x16"):
        ours = gke_names(find_slice(name))
        theirs = system.UserFacingNameToSystemCharacteristics[ours["xpk_type"]]
        assert (theirs.gke_accelerator, theirs.gce_machine_type) == (ours["gke_accelerator"], ours["machine_type"])
        assert (theirs.vms_per_slice, theirs.chips_per_vm) == (ours["hosts"], ours["chips_per_host"])


@pytest.mark.parametrize(
    "topology, accelerator_type, runtime_version, gke_accelerator, hosts",
    [
        ("v4-256", "v4-256", "tpu-ubuntu2204-base", "tpu-v4-podslice", 32),
        ("v5e-256", "v5litepod-256", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 64),
        ("v5p:8x16x16", "v5p-4096", "v2-alpha-tpuv5", "tpu-v5p-slice", 512),
        ("v6e:16x16", "v6e-256", "v2-alpha-tpuv6e", "tpu-v6e-slice", 64),
    ],
)
def test_names_of_slices_are_googles(topology, accelerator_type, runtime_version, gke_accelerator, hosts):
    """As in the tables of docs.cloud.google.com/tpu/docs: v5p, v6e, v5e, v4, runtimes."""
    of = find_slice(topology)
    assert tpu_api_names(of) == {"accelerator_type": accelerator_type, "runtime_version": runtime_version}
    names = gke_names(of)
    assert (names["gke_accelerator"], names["hosts"]) == (gke_accelerator, hosts)

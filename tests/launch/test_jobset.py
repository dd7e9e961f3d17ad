"""The manifest of launch/gke_jobset.sh against the published schema of JobSets, and against models made from it."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.launchers import dry_run, readme_commands, tele_command

SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())


@pytest.fixture(scope="module")
def manifest() -> dict:
    (case,) = (case for case in readme_commands() if case.startswith("gke_jobset.sh"))
    text = dry_run(case)
    manifest = yaml.safe_load(re.search(r"<<'MANIFEST'\n(.*?)\nMANIFEST$", text, re.DOTALL | re.MULTILINE)[1])
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == tele_command(text)
    return manifest


def models_agree(manifest: dict) -> bool:
    """Whether pydantic models of the whole JobSet, pods included, take it and keep every field of it."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api (extra dev) is missing")
    try:
        return models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    except ValueError:
        return False


def test_the_manifest_is_a_jobset(manifest):
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert models_agree(manifest)


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "failurePolicy", "maxRestart"), 3),  # a name that is not there
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),  # not one of the actions
        (("spec", "replicatedJobs", 0, "replicas"), "2"),  # text where a number belongs
    ],
)
def test_the_schema_sees_mistakes(manifest, path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(changed(manifest, path, value))


@pytest.mark.parametrize(
    "path, value",
    [
        (("parallelsim",), 4),
        (("podFailurePolicy", "rules", 0, "onExitCodes", "values"), "2"),
        (("template", "spec", "containers", 0, "volumeMount"), []),
        (("template", "spec", "volumes", 0, "csi", "driver"), None),
    ],
)
def test_the_models_see_mistakes_below_it(manifest, path, value):
    job = ("spec", "replicatedJobs", 0, "template", "spec")
    assert not models_agree(changed(manifest, (*job, *path), value))


def changed(manifest: dict, path: tuple, value) -> dict:
    manifest = copy.deepcopy(manifest)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return manifest


def test_every_host_of_the_slice_has_a_pod_with_its_chips(manifest):
    """v5p:4x4x8 is 128 chips, 4 a host."""
    job = manifest["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (1, 32, 32)
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    # A lost host starts all again; a mistake does not.
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0

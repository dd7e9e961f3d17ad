"""`tele mup`: the coordinate check, and predictions."""

import json
import re

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.lab.mup import coords, predict
from tele_jax.lab.mup.widths import at_width
from tele_jax.model.decoder import activations, hidden, layer_states
from tele_jax.settings import OptimizerConfig
from tele_jax.stages import run_config
from tele_jax.train import workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

# ------------------------------------------------------------------------------------------------------------- coords


@pytest.mark.parametrize("embed_norm", [False, True])
def test_activations_add_up_to_the_residual_stream(embed_norm):
    cfg = tele.ModelConfig(
        **dict(num_layers=3, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=16),
        **dict(dtype="float32", embed_norm=embed_norm, output_biases=True, residual_mult=0.5),
    )
    params = tele.init(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 16)
    found = activations(cfg, params, tokens)
    states = layer_states(cfg, params, tokens)
    np.testing.assert_array_equal(found["embed"], states[0])
    np.testing.assert_allclose(0.5 * (found["attn"] + found["mlp"]), np.diff(states, axis=0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found["hidden"], hidden(cfg, params, tokens), rtol=1e-5)


def test_activations_of_trained_models_keep_their_size_with_mup_alone():
    cfg = coords.MODEL.replace(num_layers=1)
    rates = OptimizerConfig(learning_rate=2**-6)
    growth = {}
    for name, base in (("base", 64), ("muP", 64), ("standard", None)):
        model = cfg if name == "base" else at_width(cfg, 256)
        growth[name] = coords._sizes(model.replace(mup_base_width=base), rates, 2, 0)[1]  # [kind, step]
    assert growth["base"].shape == (len(coords.KINDS), 2) and (growth["base"] > 0).all()
    assert (growth["muP"] < 4**0.1 * growth["base"]).all()
    assert (growth["standard"] > 4**0.4 * growth["base"])[1:].all()  # all but the embedding


def test_the_stream_keeps_its_size_over_depth_with_completep_alone():
    rates, growth = OptimizerConfig(learning_rate=2**-6), {}
    for depth, ruled in ((2, True), (16, True), (16, False)):
        model = coords.DEPTH.model(coords.MODEL.replace(embed_dim=32, num_heads=2, mlp_dim=80), depth, 2, ruled)
        assert (model.num_layers, model.residual_mult) == (depth, 2 / depth if ruled else 1)
        sizes = coords._sizes(model, rates, 2, 0)[:, coords.KINDS.index("stream")]  # value and change, [2, step]
        growth[depth, ruled] = sizes
    assert (growth[16, True] < 8**0.1 * growth[2, True]).all()
    assert (growth[16, False] > 8**0.4 * growth[2, True]).all()


@pytest.fixture
def power_laws(monkeypatch):
    """Makes sizes of the powers of the width or depth that it returns, in the place of training."""
    powers = {"muP": dict.fromkeys(coords.KINDS, -0.5), "standard": dict.fromkeys(coords.KINDS, 0.5)}

    def sizes(cfg, rates, steps, seed):
        power = powers["muP" if cfg.mup_base_width or cfg.residual_mult < 1 else "standard"]
        values = [[(cfg.embed_dim / 16 * cfg.num_layers) ** power[kind]] * steps for kind in coords.KINDS]
        return np.array([values, values]) * (1 + seed)

    monkeypatch.setattr(coords, "_sizes", sizes)
    return powers


PAGE = """from ml_collections import ConfigDict

def get_config():
    config = ConfigDict(dict(run=("small",)))
    config.small = dict(
        kind="pretrain", batch_size=4, seq_len=8, steps=2, optimizer=dict(learning_rate=3e-3),
        model=dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=40, vocab_size=4096, matrix_init_std=0.2),
        data=dict(tokenizer="none", sources=dict(a=dict(files=("none",)))),
    )
    return config
"""


def test_slopes_are_those_of_power_laws_and_decide_the_verdict(power_laws, capsys, tmp_path):
    picture, figures, page = tmp_path / "coords.png", tmp_path / "coords.json", tmp_path / "page.py"
    page.write_text(PAGE)
    command = ["mup", "coords", "--config", str(page), "--widths", "16,32,64,128", "--out", str(picture)]
    assert main([*command, "--json", str(figures)]) == 0
    assert "coordinate check passed" in capsys.readouterr().out and picture.stat().st_size > 5_000
    found = json.loads(figures.read_text())
    assert found["passed"] and found["base"] == 16 and found["learning_rate"] == 3e-3
    assert found["slopes"]["muP"]["mlp"] == pytest.approx(-0.5)
    power_laws["muP"]["attention"] = 0.3
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "with muP, attention grows with slope 0.300, above 0.1" in error and error.count("\n") == 1
    power_laws["muP"] |= {"attention": 0.0, "logits": 0.14}
    assert main(command) == 0
    power_laws["standard"] = dict.fromkeys(coords.KINDS, 0.3)
    assert main(command) == 1
    assert "without muP, no slope reaches 0.4" in capsys.readouterr().err


def test_over_depth_only_the_sums_of_blocks_are_judged(power_laws, capsys, tmp_path):
    picture, page = tmp_path / "coords.png", tmp_path / "page.py"
    page.write_text(PAGE)
    command = ["mup", "coords", "--config", str(page), "--depths", "1,2,4,8", "--out", str(picture)]
    power_laws["muP"] |= {"attention": 0.3}
    assert main(command) == 0
    assert re.search(r"attention +0\.300 +not judged +0\.500", capsys.readouterr().out)
    assert picture.stat().st_size > 5_000
    power_laws["muP"] |= {"stream": 0.2}
    power_laws["standard"] |= {"stream": 0.3, "logits": 0.3}
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "with CompleteP, stream grows with slope 0.200, above 0.1" in error
    assert "without CompleteP, no slope reaches 0.4" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depths", "2,4,8"], "depths=(2, 4, 8): a coordinate check needs at least four"),
        (["--depths", "0,2,4,8"], "layers=0 must be above 0"),
        (["--depths", "1,2,4,8", "--widths", "64,128,256,512"], "--widths and --depths are two checks; name one"),
        (["--widths", "64,128,256"], "needs at least four"),
        (["--widths", "64,100,128,256"], "width=100: num_heads=4 at width 64 would be no whole number there"),
        (["--widths", "64,"], "is no list of whole numbers"),
        (["--steps", "11"], "steps=11 must be 1 to 10"),
        (["--learning-rate", "0"], "learning_rate=0.0 must be above 0"),
        (["--out", "a.pdf"], "the picture is a .png file"),
        (["--out", "nowhere/a.png"], "there is no directory nowhere"),
        (["--config.pretrain.steps=3"], "no --config names one"),
        (["--config", "configs/lab/E5.py"], "config.run: missing"),
    ],
)
def test_a_coordinate_check_that_cannot_be_is_refused_in_one_line(words, message, capsys):
    assert main(["mup", "coords", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ predict

# nanoLM's ten published pairs (docs/facts.md): losses at 20,000 steps; sizes 72 w^2 k + V w in millions, of which the
# smallest and the largest are given.
WIDTHS = (128, 256, 384, 512, 640, 768, 896, 1024, 2048, 3072)
LOSSES = (3.9181, 3.6054, 3.4431, 3.3542, 3.2902, 3.2478, 3.224, 3.1797, 3.0854, 3.0425)
SIZES = np.array([[72 * w * w, w] for w in WIDTHS]) @ np.linalg.solve(
    [[72 * 128**2, 128], [72 * 3072**2, 3072]], [8.53, 1446.72]
)


def test_the_published_losses_of_large_widths_are_predicted_within_0_3_percent(tmp_path, capsys):
    points, figures = tmp_path / "points.json", tmp_path / "figures.json"
    points.write_text(json.dumps(list(zip(SIZES, LOSSES))[:7]))
    at = ",".join(map(str, SIZES[7:]))
    assert main(["mup", "predict", "--points", str(points), "--at", at, "--json", str(figures)]) == 0
    assert "95% interval" in capsys.readouterr().out
    found = json.loads(figures.read_text())["predicted"]
    for truth, point in zip(LOSSES[7:], found, strict=True):
        assert abs(point["loss"] / truth - 1) < 0.003
        assert point["interval"][0] < truth < point["interval"][1]


def test_the_interval_covers_the_truth_in_19_of_20_cases():
    drawn, sizes, law = np.random.default_rng(0), SIZES[:7], lambda size: 2.5 * size**-0.4 + 2.9
    covered = 0
    for _ in range(300):
        fit = predict.fit(list(zip(sizes, law(sizes) + 0.003 * drawn.standard_normal(7))))
        low, high = fit.at(SIZES[7])[1]
        covered += low < law(SIZES[7]) + 0.003 * drawn.standard_normal() < high
    assert 0.92 < covered / 300 < 0.98
    assert predict.fit([(1.0, 3.0), (2.0, 2.5), (4.0, 2.25)]).at(8.0) == (pytest.approx(2.125), None)  # 2 + 1 / size
    assert predict.fit([(1.0, 3.0), (2.0, 2.5), (4.0, 2.4)]).at(8.0)[0] == pytest.approx(2.38)  # 5 times less each


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e6, 1e10])
@pytest.mark.parametrize(("a", "b", "c"), [(2.5, -0.4, 2.9), (3.0, -0.7, 1.0), (1.0, -3.0, 2.0)])
def test_the_unit_of_the_sizes_changes_no_prediction(unit, a, b, c):
    sizes, law = np.array([1.0, 2.0, 5.0, 9.0, 20.0]), lambda size: a * size**b + c
    losses = law(sizes) + 1e-3 * np.array([1, -1, 0, 1, -1])
    (loss, ends), (known, known_ends) = (predict.fit(list(zip(sizes * u, losses))).at(40 * u) for u in (unit, 1.0))
    np.testing.assert_allclose([loss, *ends], [known, *known_ends], rtol=1e-4)
    assert ends[0] < law(40.0) < ends[1]


def test_losses_without_a_law_and_sizes_out_of_reach_are_refused():
    for losses in ((3.0, 3.0, 3.0, 3.0), (3.0, 3.1, 3.4, 4.0)):
        with pytest.raises(UserError, match=r"follow no law a\*C\^b \+ c that falls with C"):
            predict.fit(list(zip((1.0, 2.0, 4.0, 8.0), losses)))
    noisy = predict.fit([(5.4, 2.95), (13.4, 2.92), (23.9, 2.88), (37.0, 2.82)])  # they fall ever faster
    assert noisy.b < 0 and 2.5 < noisy.at(394.0)[0] < 2.82
    fit = predict.fit([(1.0, 3.0), (2.0, 2.5), (4.0, 2.25), (8.0, 2.12)])
    with pytest.raises(UserError, match="too far from the sizes of the fit"):
        fit.at(1e-320)


def fake_run(directory, width, losses, tokens=32):
    """A work directory of a run of PAGE at a width, with its figures and nothing else."""
    page = directory.with_suffix(".py")
    page.write_text(PAGE)
    config = run_config(load_page(str(page), [f"--config.small.model.embed_dim={width}"]))
    (directory / "small" / "metrics").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(workdir.as_json(config)))
    lines = [json.dumps({"step": s, "loss": loss, "tokens": s * tokens}) + "\n" for s, loss in losses.items()]
    (directory / "small" / "metrics" / "metrics.jsonl").write_text("".join(lines))
    return directory, tele.count_params(config.stages["small"].model) / 1e6


def test_points_are_read_from_work_directories_at_a_common_step(tmp_path, capsys):
    runs, sizes = zip(*(fake_run(tmp_path / f"w{w}", w, {1: 5.0, 2: 3 + 1 / w, w: 1.0}) for w in (16, 32, 64)))
    assert predict.of_runs(runs) == list(zip(sizes, (3 + 1 / 16, 3 + 1 / 32, 3 + 1 / 64)))
    assert predict.of_runs(runs, step=1)[0][1] == 5.0
    other, _ = fake_run(tmp_path / "other", 128, {2: 3.0}, tokens=64)
    for words, message in (
        ([*runs, other, "--at", "1"], "step 2: the runs have seen 64, 128 tokens there"),
        ([*runs, "--at", "1", "--step", "3"], "--step 3: not all runs have loss there; the last that all have is 2"),
        ([*runs, "--at", "1", "--figure", "los"], "has no figure 'los'; did you mean 'loss'?"),
        ([*runs[:2], "--at", "1"], "2 sizes: a*C^b + c needs at least three"),
        ([tmp_path, "--at", "1"], "holds no run"),
        (["--at", "1"], "name work directories, or --points FILE"),
        ([*runs, "--at", "1,x"], "'1,x' is no list of numbers"),
        ([*runs, "--at", "0"], "size=0.0 must be above 0"),
        (["--points", tmp_path / "w16" / "config.json", "--at", "1"], "is no list of pairs"),
    ):
        capsys.readouterr()
        assert main(["mup", "predict", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

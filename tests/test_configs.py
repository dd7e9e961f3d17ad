"""The pages in configs/ for published models: they load, fit together, and say what the reports say."""

from pathlib import Path

import pytest

from tele_jax import growth
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.model.spec import count_params
from tele_jax.published import get_model
from tele_jax.settings import GrowStage
from tele_jax.stages import run_config
from tele_jax.train.optimizer import schedule

CONFIGS = Path(__file__).parents[1] / "configs"
PAGES = ["tele_flm_52b.py", "tele_flm_series.py", "tele_flm_proxy.py"]
PAGES += [f"sft.py:{recipe}" for recipe in ("tele_flm", "telechat", "telechat2")]
PAGES += ["telechat2_align.py:telechat2"]
PAGES += ["reasoning_grpo.py:telechat", "telechat_align.py:telechat"]
PAGES += [f"telechat.py:{size}" for size in ("1b", "3b", "7b", "12b")]


def page(name):
    return run_config(load_page(str(CONFIGS / name)))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_a_run_whose_stages_follow_from_each_other(name):
    config = page(name)
    cfg = None if config.start is None else get_model("tele_flm_52b")
    for stage in config.stages.values():
        if isinstance(stage, GrowStage):
            larger = cfg.replace_from(stage.model, "config.model")
            plan = growth.plan(cfg, larger, policy=stage.policy, epsilon=stage.epsilon)
            growth.check(plan)
            cfg = plan.dst_cfg
        else:
            cfg = stage.model or cfg
            assert schedule(stage.schedule, stage.steps or 100, stage.batch_size * stage.seq_len)(0) >= 0


def test_the_pages_hold_the_published_figures():
    stage = page("tele_flm_52b.py").stages["pretrain"]
    assert stage.batch_size * stage.seq_len == 5_505_024
    assert stage.steps * 5_505_024 == pytest.approx(2.0e12, rel=1e-5)
    ratio = stage.model.width_ratio
    assert ratio == 16 and stage.optimizer.matrix_learning_rate / ratio == pytest.approx(1.5e-4)
    assert stage.model.logit_mult == pytest.approx(3.125e-2)
    assert stage.model.matrix_init_std / ratio**0.5 == pytest.approx(4.242e-3, rel=1e-3)
    factor = schedule(stage.schedule, stage.steps, 5_505_024)
    assert [float(factor(step)) for step in (999, 1_999)] == pytest.approx([0.5, 1.0], rel=1e-6)
    assert 0.1 < float(factor(stage.steps)) < 0.25  # the cosine ends half a trillion tokens later
    stages = page("tele_flm_series.py").stages
    tokens = [s.steps * s.batch_size * s.seq_len for s in stages.values() if not isinstance(s, GrowStage)]
    assert tokens == pytest.approx([2.0e12, 0.3e12, 15.7e9], rel=1e-3)
    sft = page("sft.py:tele_flm").stages["sft"]
    assert (sft.epochs, sft.batch_size, sft.seq_len, sft.packed) == (4, 128, 2_048, False)
    rate = schedule(sft.schedule, 961, 1)
    assert 2.7e-5 * float(rate(961)) == pytest.approx(1e-9, rel=1e-3) and 2.7e-5 * float(rate(0)) == 2.7e-5
    sft = page("sft.py:telechat").stages["sft_long"]
    assert (sft.seq_len, sft.batch_size, sft.optimizer.learning_rate, sft.optimizer.eps) == (8_192, 32, 3e-5, 1e-5)
    rate = schedule(sft.schedule, 1_000, 1)
    assert [float(rate(step)) for step in (0, 99, 549)] == pytest.approx([0.01, 1.0, 0.5], abs=2e-3)
    sources = page("sft.py:telechat2").stages["sft"].data.sources
    weights = {"single": 1.42, "multi": 1.2, "math": 1.78, "code": 1.0, "role": 1.24, "tool": 1.01}
    assert {name: source.copies for name, source in sources.items()} == weights
    for size, count in (("7b", 7_200_018_432), ("12b", 12_386_432_000)):
        assert count_params(page(f"telechat.py:{size}").stages["pretrain"].model) == count


def test_a_page_is_given_its_argument_and_refuses_another():
    with pytest.raises(UserError, match=r"telechat\.py:8b: sizes are 1b, 3b, 7b, 12b"):
        page("telechat.py:8b")
    with pytest.raises(UserError, match="no such file"):
        page("nothing.py:7b")

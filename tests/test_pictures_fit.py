"""Texts of pictures lie inside them, and not on one another."""

from pathlib import Path

import pytest

import tele_jax as tele
from tele_jax import growth, plots
from tele_jax.cli.pages import load_page
from tele_jax.lab import paths, read_study

pytest.importorskip("matplotlib", reason="the extra [plots] is not installed")


def test_the_title_of_a_plan_that_grows_all_axes_lies_inside_the_picture():
    src, dst = (tele.get_model(name) for name in ("tele_flm_52b", "tele_flm_1t"))
    figure = plots.plan(growth.plan(src, dst, policy="msg"))
    figure.draw_without_rendering()
    title = figure.axes[0].title
    box = title.get_window_extent()
    assert "vocab 80384 -> 81920" in title.get_text().replace(",", "").replace("\n", " ")
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def drawn(name, reached):
    """The picture of a study of paths whose arms reach the baseline's loss, or do not."""
    study = read_study(load_page(f"{Path(__file__).parents[1]}/configs/lab/{name}.py:cpu"))
    ends = [[1e10, 3.2], [1e11, 3.0]]
    results = {}
    for arm in study.arms:
        last = 3.0 if study.arms[arm].get("baseline") == arm or reached else 3.1
        last = 3.0 if arm == study.settings["baseline"] else last
        done = {"flops": 1e11, "branches": [ends[0], [1e11, last]], "curve": ends, "tuned": {}, "learning_rate": None}
        results[arm] = dict.fromkeys(study.seeds, done)
    figure = paths.picture(study, results)
    figure.draw_without_rendering()
    return figure


def said_of_arms(figure):
    return [text for text in figure.axes[1].texts if text.get_text()]


@pytest.mark.parametrize("name", ["E2", "E3", "E4", "E5", "E6"])
@pytest.mark.parametrize("reached", [True, False])
def test_what_a_picture_of_paths_says_lies_inside_it_and_not_on_one_another(reached, name):
    figure = drawn(name, reached)
    boxes = [text.get_window_extent() for text in said_of_arms(figure)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    boxes += [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert len(boxes) > 5 and all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("reached", [True, False])
def test_a_bound_is_called_one(reached):
    said = said_of_arms(drawn("E2", reached))
    assert len(said) > 5 and all(("at least" in text.get_text()) is not reached for text in said)

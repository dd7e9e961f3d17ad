"""Figures show the figures they were given: read back from what is drawn, not from pixels."""

import dataclasses
import io
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra [plots] is not installed")

from matplotlib import image

import tele_jax as tele
from tele_jax import growth, plots
from tele_jax.axes import flatten
from tests.growth.strategies import without_compiling

SRC = tele.ModelConfig(num_layers=2, embed_dim=6, num_heads=2, head_dim=4, mlp_dim=5, vocab_size=16, dtype="float32")
DST = SRC.replace(num_layers=3, embed_dim=11, num_heads=3, mlp_dim=8)

RECEIPT = {
    **dict(max_rel=3e-7, kl=-2e-9, tolerance=2e-5, preserving=True, lively=True, ok=True),
    **dict(dead=[], locked=["mlp[6] = mlp[5]", "mlp[7] = mlp[5]"]),
}


def saved_pixels(figure):
    """float[height, width, 4], the figure as it is saved."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return image.imread(buffer)


def texts(axes):
    return [text.get_text() for text in axes.texts]


# ------------------------------------------------------------------------------------------------------------- loss


def test_losses_are_drawn_panel_by_panel_with_the_growths():
    first, second = (
        {"small": ([0, 1, 2], [5.0, 4.0, 3.5]), "large": ([2, 3], [3.5, 3.25])},
        {"en": ([0, 3], [2.5, 1.5])},
    )
    figure = plots.loss({"loss, nats": first, "held out, bits": second}, growths=[2], x_label="tokens, millions")
    above, below = figure.axes
    for axes, curves, label in ((above, first, "loss, nats"), (below, second, "held out, bits")):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == [*curves, "growth"]
        for name, (xs, ys) in curves.items():
            assert lines[name].get_xdata().tolist() == xs and lines[name].get_ydata().tolist() == ys
        assert list(lines["growth"].get_xdata()) == [2, 2]
        assert axes.get_ylabel() == label
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert below.get_xlabel() == "tokens, millions"


def test_curves_are_told_apart_by_colour_and_then_by_line():
    curves = {str(i): ([0, 1], [i, i]) for i in range(12)}
    (axes,) = plots.loss({"loss": curves}).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_a_part_of_the_axis_is_shown_with_the_losses_that_are_seen_there():
    (axes,) = plots.loss({"loss": {"a": ([0, 10, 20], [100.0, 2.0, 1.0])}}, x_range=(10, 20)).axes
    assert axes.get_xlim() == (10, 20)
    low, high = axes.get_ylim()
    assert 0.9 < low < 1 and 2 < high < 2.1


def test_losses_that_cannot_be_drawn_are_refused():
    with pytest.raises(tele.UserError, match="no panel to draw"):
        plots.loss({})
    with pytest.raises(tele.UserError, match="'small' has 2 xs and 1 ys"):
        plots.loss({"loss": {"small": ([0, 1], [5.0])}})


# ------------------------------------------------------------------------------------------------------------- plan


def test_the_shares_of_a_plan_are_those_of_the_grown_arrays():
    with without_compiling():
        plan = growth.plan(SRC, DST, layers=[0, 1, 1])
        twos = jax.tree.map(lambda leaf: np.full(leaf.shape, 2, leaf.dtype), tele.spec(SRC))
        grown = {name: np.asarray(array) for name, array in flatten(growth.apply(plan, twos)).items()}
    (axes,) = plots.plan(plan).axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in axes.containers}
    copied, scaled, zero, fresh = bars.values()
    assert rows == ["all parameters", *grown]
    for row, array in enumerate(grown.values(), start=1):
        # Copies of a 2 are 2, scaled ones 2 * sqrt(6/11) or so; fresh values are random, or 1 in norm scales.
        of_source = (array == 2) | np.isclose(array, 2 * np.sqrt(6 / 11))
        assert copied[row] + scaled[row] + zero[row] + fresh[row] == pytest.approx(100)
        assert zero[row] == pytest.approx(100 * np.mean(array == 0))
        assert copied[row] + scaled[row] == pytest.approx(100 * np.mean(of_source))
        assert copied[row] == pytest.approx(100 * np.mean(array == 2))
    total = sum(array.size for array in grown.values())
    assert zero[0] == pytest.approx(100 * sum((array == 0).sum() for array in grown.values()) / total)
    assert texts(axes)[0] == f"{total:,}" == f"{tele.count_params(DST):,}"
    assert texts(axes)[1 + list(grown).index("layers.mlp.up")] == "264 = 3 x 11 x 8"
    assert "policy exact" in axes.get_title() and "embed 6 -> 11" in axes.get_title()


# --------------------------------------------------------------------------------------------------------- receipts


def dots(axes):
    """{row: (x, marker)} of the dots of a panel."""
    return {
        int(line.get_ydata()[0]): (line.get_xdata()[0], line.get_marker())
        for line in axes.lines
        if line.get_marker() in "oXs"
    }


def test_the_receipt_of_these_tests_has_the_fields_of_a_report():
    assert RECEIPT.keys() - {"ok"} <= {field.name for field in dataclasses.fields(growth.Report)}


def test_receipts_are_compared_row_by_row():
    moved, divergence, units = plots.receipts(
        {
            "copies": {**RECEIPT, "lively": False},
            "broken": {**RECEIPT, "ok": False, "max_rel": 0.3, "kl": 0.1, "dead": ["embed[9] in layers.mlp.up"]},
            "other": {**RECEIPT, "preserving": False, "max_rel": 1.5},
            "equal": {**RECEIPT, "max_rel": 0.0, "kl": 0.0, "locked": []},
            "in parts": {**RECEIPT, **dict.fromkeys(("max_rel", "kl", "tolerance", "dead", "locked"))},
        }
    ).axes
    assert [label.get_text().split("\n")[1] for label in moved.get_yticklabels()] == [
        "ok, but copies stay copies",
        "NOT ok",
        "changes the function",
        "ok",
        "ok",
    ]
    assert dots(moved) == {0: (3e-7, "o"), 1: (0.3, "X"), 2: (1.5, "s")}
    assert dots(divergence) == {0: (2e-9, "o"), 1: (0.1, "X"), 2: (2e-9, "s")}
    assert texts(moved) == ["3e-07", "0.3", "1.5", "0, exactly", "not checked"]
    low, high = moved.get_xlim()
    assert low < 3e-7 and high > 1.5
    # A policy that promises nothing has no tolerance to stay below, nor has what was not checked.
    marks = [sorted(line.get_ydata()) for line in moved.lines if line.get_marker() == "None"]
    assert [round(sum(mark) / 2) for mark in marks] == [0, 1, 3]
    counted = {bar.get_label().split(":")[0]: [patch.get_width() for patch in bar] for bar in units.containers}
    assert counted == {"dead": [0, 1, 0, 0, 0], "locked": [2, 2, 2, 0, 0]}
    assert texts(units)[4] == " not checked" and texts(units)[5] == " 2 locked"


def test_what_is_no_receipt_is_refused():
    with pytest.raises(tele.UserError, match="no receipt to draw"):
        plots.receipts({})
    with pytest.raises(tele.UserError, match="'mine' is no receipt of a growth: kl, tolerance missing"):
        plots.receipts({"mine": {key: value for key, value in RECEIPT.items() if key not in ("kl", "tolerance")}})


# ----------------------------------------------------------------------------------------------------- layer scores


def test_layer_scores_are_bars_and_the_copied_layers_stand_out():
    scores = [0.05, 0.2, 0.1, 0.3, 0.01]
    chosen = growth.plan(SRC.replace(num_layers=5), DST.replace(num_layers=7), layers="distance", scores=scores)
    receipt = {"layer_scores": scores, "layers": chosen.maps["layers"].index.tolist(), "layer_metric": "angular"}
    assert receipt["layers"] == [0, 1, 1, 2, 2, 3, 4]
    (axes,) = plots.layer_scores(receipt).axes
    bars = {
        bar.get_label().split(":")[0].split(";")[0]: {
            round(patch.get_x() + patch.get_width() / 2): patch.get_height() for patch in bar
        }
        for bar in axes.containers
    }
    assert bars == {"copied": {1: 0.2, 2: 0.1}, "not copied": {3: 0.3}, "first and last": {0: 0.05, 4: 0.01}}
    assert len({bar[0].get_facecolor() for bar in axes.containers}) == 3
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("+1", (1, 0.2)), ("+1", (2, 0.1))]
    assert "angular" in axes.get_ylabel() and "5 -> 7" in axes.get_title()


def test_layer_scores_without_a_metric_are_cosine_and_of_two_layers_both_can_be_copied():
    (axes,) = plots.layer_scores({"layer_scores": [0.2, 0.1], "layers": [0, 1, 1, 1]}).axes
    assert "1 - cos(in, out)" in axes.get_ylabel()
    assert [bar.get_label().split(";")[0] for bar in axes.containers] == ["copied", "not copied"]
    assert texts(axes) == ["+2"]


def test_a_receipt_without_layer_scores_is_refused():
    with pytest.raises(tele.UserError, match="no layer scores"):
        plots.layer_scores({"layer_scores": None, "layers": [0, 1]})


# ------------------------------------------------------------------------------------------------------------ masks


def test_the_mask_ramp_is_drawn_step_by_step():
    plan = growth.plan(SRC, DST, policy="msg")
    (axes,) = plots.mask_ramp(growth.MaskSchedule(plan, start=10, ramp=20), 41).axes
    (ramp,) = (line for line in axes.lines if "new units" in line.get_label())
    assert ramp.get_xdata().tolist() == list(range(41))
    np.testing.assert_allclose(ramp.get_ydata(), np.clip((np.arange(41) - 10) / 20, 0, 1), rtol=0, atol=1e-7)
    assert {"layers", "embed", "heads", "mlp"} <= set(ramp.get_label().removeprefix("new units of ").split(", "))
    (gone,) = (line for line in axes.lines if "without masks" in line.get_label())
    assert list(gone.get_xdata()) == [30, 30]


def test_axes_whose_masks_rise_apart_have_a_line_each():
    plan = growth.plan(SRC, DST.replace(num_layers=2, num_heads=2), policy="msg")

    class EmbedFirst:
        def __init__(self, plan):
            self.plan = plan

        def __call__(self, step):
            masks = growth.MaskSchedule(self.plan, ramp=10)(0)
            masks["embed"] = np.where(self.plan.maps["embed"].fresh, np.float32(min(1, step / 5)), np.float32(1))
            return masks

    (axes,) = plots.mask_ramp(EmbedFirst(plan), [0, 5, 9]).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines if "new units" in line.get_label()}
    assert lines == {"new units of embed": [0, 1, 1], "new units of mlp": [0, 0, 0]}


def test_a_growth_without_masks_has_no_ramp():
    with pytest.raises(tele.UserError, match="policy exact has none"):
        plots.mask_ramp(growth.MaskSchedule(growth.plan(SRC, DST)), 10)
    with pytest.raises(tele.UserError, match="no step at all"):
        plots.mask_ramp(growth.MaskSchedule(growth.plan(SRC, DST, policy="msg")), 0)


# ------------------------------------------------------------------------------------------------- figures as such


def test_a_figure_is_900_pixels_wide_saved_and_in_a_notebook():
    figure = plots.layer_scores({"layer_scores": [0.2, 0.1], "layers": [0, 1, 1]})
    shown = image.imread(io.BytesIO(figure._repr_png_()))[..., :3]
    saved = saved_pixels(figure)[..., :3]
    assert shown.shape == saved.shape and saved.shape[1] == 900
    assert np.abs(shown - saved).max() < 0.1  # a palette of 256 colours


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_drawing_touches_neither_pyplot_nor_the_backend():
    done = python(
        "import sys, tele_jax as tele; assert 'matplotlib' not in sys.modules; tele.plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "tele.plots.loss({'loss': {'a': ([0], [1.0])}})._repr_png_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_matplotlib_names_the_extra():
    done = python(
        "import sys; sys.modules['matplotlib'] = None\n"
        "import tele_jax as tele\n"
        "try: tele.plots.loss({'loss': {'a': ([0], [1.0])}})\n"
        "except tele.UserError as error: print(error)"
    )
    assert done.stdout == (
        "tele.plots needs the package 'matplotlib', which is not installed: pip install 'tele_jax[plots]'\n"
    ), done.stderr


# --------------------------------------------------------------------------------------------------------- evaluations


def test_bits_per_byte_are_bars_by_domain_with_their_intervals_and_the_floor():
    values = {
        "small": {"en": (1.5, [1.25, 2.0]), "zh": (2.0, None)},
        "large": {"en": (1.0, [0.5, 1.25]), "zh": (1.5, None)},
    }
    models = {
        model: {"domains": {name: {"bits_per_byte": x, "interval": ends} for name, (x, ends) in found.items()}}
        for model, found in values.items()
    }
    figure = plots.bits_per_byte({"text": {"en": {"xz": 2.5}, "zh": {"xz": 3.0}}, "models": models})
    (axes,) = figure.axes
    bars = [container for container in axes.containers if container.get_label() in values]
    assert [[bar.get_height() for bar in group] for group in bars] == [[1.5, 2.0], [1.0, 1.5]]
    *whiskers, floors = (collection.get_segments() for collection in axes.collections)
    assert [[segment[:, 1].tolist() for segment in group] for group in whiskers] == [
        [[1.25, 2.0], [2.0, 2.0]],
        [[0.5, 1.25], [1.5, 1.5]],
    ]
    assert [segment[0, 1] for segment in floors] == [2.5, 3.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["en", "zh"]
    with pytest.raises(tele.UserError, match="no results of tele eval bpb"):
        plots.bits_per_byte({})

"""The HTML page about runs: what it shows in a real browser, and what it says of wrong input."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from tele_jax.cli.main import main
from tele_jax.config import to_dict
from tele_jax.report import page
from tele_jax.report import runs as reading
from tele_jax.stages import run_config

pytest.importorskip("matplotlib", reason="the extra [plots] is not installed")

MODEL = dict(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=32)
LARGER = MODEL | dict(num_layers=3, mlp_dim=20)
DATA = {"tokenizer": "t.model", "sources": {"en": {"files": ["en.jsonl"]}}}
FLOPS, RATE = 1000.0, 100.0  # FLOPs of a token, tokens per second
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Written into a copy of the page, which itself has no script.
PROBE = """<script>addEventListener("load", () => {
  const figures = [...document.querySelectorAll("svg")].map(figure => {
    const box = figure.getBoundingClientRect(), paths = figure.querySelectorAll("path").length;
    return [Math.round(box.width), Math.round(box.height), paths, figure.querySelectorAll("text").length];
  });
  const ids = [...document.querySelectorAll("[id]")].map(one => one.id);
  const found = {figures, width: document.documentElement.scrollWidth, seen: innerWidth, ids: ids.length,
                 different: new Set(ids).size};
  parent.postMessage(JSON.stringify(found), "*");
})</script>"""
# Shows the page in a frame, for the window of a browser without a screen is at least 500 pixels wide.
FRAME = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script>
addEventListener("message", event => document.body.setAttribute("data-found", event.data))
</script><body><iframe src="{source}" style="border: 0; width: {width}px; height: 900px"></iframe></body>"""


def make_run(directory, rate=0.01, loss=3.0):
    """A work directory of two stages with a growth between them, as `tele train` writes it."""
    stage = dict(kind="pretrain", data=DATA, steps=20, batch_size=2, seq_len=8, optimizer={"learning_rate": rate})
    run = ["small", "grow", "large"]
    config = {"run": run, "small": stage | {"model": MODEL}, "grow": dict(kind="grow", policy="exact", model=LARGER)}
    written = to_dict(run_config(config | {"large": stage}))
    directory.mkdir(parents=True)
    stages = written.pop("stages", {})
    (directory / "config.json").write_text(json.dumps(written | stages))
    receipt = dict(policy="exact", ok=True, max_abs=1e-6, max_rel=1e-7, tolerance=1e-5, kl=2e-9, dead=[], locked=[])
    receipt |= dict(src_cfg=MODEL, dst_cfg=LARGER, masked=False, layers=[0, 1, 1], layer_scores=[0.5, 0.1])
    for at, name in enumerate(run):
        summary = {"stage": name, "kind": "grow" if name == "grow" else "pretrain", "parameters": 1000 * (at + 1)}
        (directory / name / "metrics").mkdir(parents=True)
        if name == "grow":
            summary["receipt"] = {key: receipt[key] for key in ("policy", "max_abs", "max_rel", "kl", "ok")}
            (directory / name / "growth_receipt.json").write_text(json.dumps(receipt))
        else:
            summary |= {"tokens": 320, "flops": 320 * FLOPS, "bits_per_byte_after": {"en": 2.5}}
            speed = {"tokens_per_second": RATE, "model_flops_per_second": RATE * FLOPS * (at + 1)}
            lines = [{"step": 0, "eval/bits_per_byte/en": 4.0 - at}]
            lines += [{"step": s, "loss": loss - s / 50 - at / 4, "tokens": 16.0 * s, **speed} for s in (10, 20)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (directory / name / "metrics" / "metrics.jsonl").write_text(text)
        (directory / name / "summary.json").write_text(json.dumps(summary))
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return [make_run(directory / "one"), make_run(directory / "_other $\\frac$ <b>", rate=0.02, loss=2.5)]


def test_curves_go_on_over_growths_in_tokens_and_in_flops(two):
    runs = [reading.read(path, path.name) for path in two]
    over_tokens, growths = reading.curves(runs[:1], "tokens")
    assert growths == pytest.approx([320e-6])
    xs, ys = over_tokens["training loss, nats per token"]["large, 3k"]
    assert xs == pytest.approx([480e-6, 640e-6]) and ys == pytest.approx([2.3, 2.1])
    over_flops, growths = reading.curves(runs, "flops")
    assert growths == [320 * FLOPS]
    xs, _ = over_flops["training loss, nats per token"]["one"]
    assert xs == pytest.approx([160e3, 320e3, 320e3 + 160 * 3 * FLOPS, 320e3 + 320 * 3 * FLOPS])
    xs, ys = over_flops["en: bits per byte"]["_other $\\frac$ <b>"]
    assert xs == pytest.approx([0, 320e3]) and ys == [4.0, 2.0]


def test_a_branch_begins_where_the_stage_that_it_goes_on_from_ended(two):
    run = reading.read(two[0], "one")
    run.stages[2].config["after"] = "small"
    run.stages.append(dataclasses.replace(run.stages[2], name="beside"))
    panels, _ = reading.curves([run], "tokens")
    loss = panels["training loss, nats per token"]
    assert loss["beside, 3k"] == loss["large, 3k"] and loss["large, 3k"][0] == pytest.approx([480e-6, 640e-6])
    several, _ = reading.curves([run, run], "tokens")  # a curve per run has a gap, not a line back
    xs = several["training loss, nats per token"]["one"][0][:7]
    np.testing.assert_allclose(xs, np.array([160, 320, 480, 640, np.nan, 480, 640]) * 1e-6)


def test_settings_that_differ_are_named_and_no_others(two):
    runs = [reading.read(path, path.name) for path in two]
    found = dict(page.differences(runs))
    assert found == {f"{stage}.optimizer.learning_rate": ["0.01", "0.02"] for stage in ("small", "large")}


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.fetched, self.kinds = [], set()

    def handle_starttag(self, tag, attrs):
        self.kinds.add(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data") and value]


def test_the_page_has_all_in_one_file_and_asks_nobody(two, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", *map(str, two), "--html", str(out)]) == 0
    assert f"page: {out}" in capsys.readouterr().out
    tags = Tags()
    tags.feed(text := out.read_text(encoding="utf-8"))
    assert {"svg", "table", "details"} <= tags.kinds and "script" not in tags.kinds
    assert all(at.startswith(("#", "data:")) for at in tags.fetched), tags.fetched
    assert not re.search(r"@import|url\((?!['\"]?#)", text)
    assert "other $\\frac$ &lt;b&gt;" in text and "other $\\frac$ <b>" not in text, "names are text, not markup"
    assert "num_layers 2 → 3" in text and "verified" in text and "small.optimizer.learning_rate" in text
    first = out.read_bytes()
    assert main(["report", *map(str, two), "--html", str(out)]) == 0
    assert out.read_bytes() == first, "the same runs give the same bytes"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_every_figure_without_an_error(two, tmp_path, width):
    out = tmp_path / "report.html"
    page.write(two, out)
    out.write_text(out.read_text(encoding="utf-8").replace("</head>", PROBE + "</head>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(source=out.as_uri(), width=width), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert found["seen"] == width
    assert found["width"] <= found["seen"], "the page itself does not scroll sideways"
    assert len(found["figures"]) == 4, "loss over tokens and over FLOPs, and the layers of two growths"
    for wide, high, paths, texts in found["figures"]:
        assert wide >= 400 and high >= 100 and paths > 5 and texts > 5
    assert found["ids"] == found["different"], "ids of figures do not clash"


def test_wrong_input_is_one_line(two, tmp_path, capsys):
    def said(*arguments):
        assert main(["report", *map(str, arguments)]) == 2
        return capsys.readouterr().err.strip()

    assert "holds no run" in said(tmp_path)
    assert "named twice" in said(two[0], two[0])
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    assert "is not a page that `tele report --html` wrote" in said(two[0], "--html", other)
    assert other.read_text() == "<p>mine</p>"
    assert "there is no directory" in said(two[0], "--html", tmp_path / "no" / "r.html")

"""`tele plan` as a user meets it; what needs the TPU compiler is skipped where libtpu is not installed."""

import gzip
import importlib.util
import json

import pytest

from tele_jax.cli.main import main

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'tele_jax[tpu]', 684 MB)"
)
MODEL = ["--model", "tele_flm_52b", "--topology", "v5p:4x4x8"]
PAGE = """
from ml_collections import ConfigDict

def get_config():
    model = dict(num_layers=3, embed_dim=256, num_heads=2, mlp_dim=512, vocab_size=1024, max_seq_len=512)
    data = dict(tokenizer="not/there.model", sources=dict(en=dict(files=("not/there.txt",))))
    stage = dict(kind="pretrain", data=data, optimizer=dict(learning_rate=1e-3), steps=10, batch_size=4, seq_len=512)
    return ConfigDict(dict(
        run=("first", "grow", "second"), first=dict(model=model, **stage), second=stage,
        grow=dict(kind="grow", model=dict(num_layers=4)), mesh=dict(fsdp=2, tensor=2),
    ))
"""


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.py"
    file.write_text(PAGE)
    return str(file)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "v5p:4x4x8"], "give either --config FILE or --model NAME"),
        (["--model", "tele_flm_53b", "--topology", "v5p:4x4x8"], "did you mean 'tele_flm_52b'?"),
        (["--model", "tele_flm_52b", "--topology", "v9:1"], "'v9:1': not known; known are v4:4x4x8"),
        (MODEL, "--mesh: missing; for example fsdp=128, or --search"),
        ([*MODEL, "--mesh", "fsdp=128"], "--batch-size: missing"),
        ([*MODEL, "--mesh", "fsdp:128"], "expected AXIS=SIZE,... with data, fsdp and tensor"),
        ([*MODEL, "--mesh", "fsdb=128", "--batch-size", "128"], "--mesh.fsdb: unknown key of MeshConfig; did you mean"),
        ([*MODEL, "--mesh", "fsdp=4", "--batch-size", "128"], "= 4 devices, but v5p:4x4x8 has 128"),
        ([*MODEL, "--mesh", "tensor=128", "--batch-size", "1"], "kv_heads=64 does not divide over mesh tensor=128"),
        ([*MODEL, "--mesh", "fsdp=128", "--batch-size", "96"], "batch_size=96 (per microbatch) does not divide"),
        ([*MODEL, "--mesh", "fsdp=128", "--batch-size", "0"], "--batch-size 0: must be above 0"),
        ([*MODEL, "--mesh", "fsdp=128", "--batch-size", "128", "--remat", "ful"], "'ful' is not one of 'none', 'full'"),
        ([*MODEL, "--mesh", "fsdp=128", "--config.x=1"], "changes a page, and --model names none"),
        ([*MODEL, "--mesh", "fsdp=128", "--stage", "sft"], "--stage sft: is a stage of a page"),
        ([*MODEL, "--mesh", "fsdp=64,fsdp=2", "--batch-size", "64"], "gives fsdp twice"),
        ([*MODEL, "--num-slices", "2", "--mesh", "fsdp=256", "--batch-size", "256"], "data=1: there are 2 slices"),
        ([*MODEL, "--search", "--batch-size", "7"], "no mesh of 128 devices divides this model and batch"),
        ([*MODEL, "--search", "--batch-size", "128", "--tries", "0"], "--tries 0: must be above 0"),
        ([*MODEL, "--mesh", "fsdp=128", "--policy", "msg"], "--policy: is that of a growth; give --grow-to"),
        ([*MODEL, "--mesh", "fsdp=128", "--grow-to", "telechat_7b"], "num_layers would shrink"),
        ([*MODEL, "--mesh", "fsdp=128", "--grow-to", "tele_flm_102b", "--remat", "full"], "no meaning for a growth"),
        ([*MODEL, "--mesh", "fsdp=128", "--decode"], "--batch-size: missing; rows that are decoded together"),
        ([*MODEL, "--mesh", "fsdp=128", "--decode", "--microbatches", "2"], "no meaning for --decode"),
        ([*MODEL, "--mesh", "fsdp=128", "--decode", "--batch-size", "128", "--seq-len", "5000"], "above the"),
        ([*MODEL, "--mesh", "fsdp=128", "--batch-size", "128", "--seq-len", "5000"], "above the model's max_seq_len"),
        ([*MODEL, "--mesh", "fsdp=1²", "--batch-size", "128"], "expected AXIS=SIZE"),
        ([*MODEL, "--search", "--batch-size", "128", "--mesh", "fsdp=128"], "--mesh: has no meaning for --search"),
        ([*MODEL, "--search", "--batch-size", "128", "--remat", "full"], "--remat: has no meaning for --search"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(argv, says, capsys):
    assert main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_a_page_without_such_a_stage(page, capsys):
    assert main(["plan", "--config", page, "--topology", "v5e:2x2", "--stage", "third"]) == 2
    assert f"--stage third: no stage of {page}; it has first, grow, second" in capsys.readouterr().err


@pytest.fixture
def going_on(tmp_path, page):
    """A page whose first stage grows what config.start holds."""
    from pathlib import Path

    file = tmp_path / "going_on.py"
    text = Path(page).read_text().replace("first=dict(model=model, **stage), ", "")
    file.write_text(text.replace('run=("first", "grow", "second")', 'run=("grow", "second"), start="not/there"'))
    return str(file)


def test_the_model_of_a_page_s_start_is_looked_for_there_or_named(going_on, page, capsys):
    on = ["plan", "--topology", "v5e:2x2"]
    assert main([*on, "--config", going_on]) == 2
    assert "not/there: no such directory" in (err := capsys.readouterr().err) and "--model NAME says which" in err
    # TeleChat 7B has more layers than the 4 that this page grows to: it is what is grown, before the last stage too.
    for stage in (["--stage", "grow"], []):
        assert main([*on, "--config", going_on, *stage, "--model", "telechat_7b"]) == 2
        assert "config.grow: num_layers would shrink, 30 -> 4" in capsys.readouterr().err
    assert main([*on, "--config", page, "--model", "telechat_7b"]) == 2
    assert "has a model of its own" in capsys.readouterr().err


def test_rows_of_pairs_are_those_of_the_page_s_batch(tmp_path, capsys):
    """With another --batch-size they would be longer rows, or shorter ones: another program than the one that runs."""
    file = tmp_path / "pairs.py"
    file.write_text(PAGE.replace("second=stage", 'second=dict(stage, kind="reward", rows=2)'))
    argv = ["plan", "--config", str(file), "--topology", "v5e:2x2"]
    assert main([*argv, "--batch-size", "8"]) == 2
    err = capsys.readouterr().err
    assert "--batch-size 8: config.second.rows=2 is that of 4 pairs" in err and err.count("\n") == 1
    assert "--config.second.batch_size=8 and --config.second.rows=N" in err
    both = ["--config.second.batch_size=8", "--config.second.rows=4"]
    for words in ([], ["--batch-size", "4"], both, [*both, "--batch-size", "8"]):
        main([*argv, *words, "--mesh", "fsdp=3"])  # refused for its mesh, after the rows
        assert "= 3 devices, but v5e:2x2 has 4" in capsys.readouterr().err


def test_the_slices_are_those_of_the_page(page, capsys):
    two = ["--config.num_slices=2", "--config.mesh.data=2"]
    argv = ["plan", "--config", page, *two, "--topology", "v5e:2x2", "--mesh", "fsdp=8"]
    assert main(argv) == 2
    assert "data=1: there are 2 slices" in capsys.readouterr().err
    assert main([*argv, "--num-slices", "1"]) == 2
    assert "= 8 devices, but v5e:2x2 has 4" in capsys.readouterr().err


@needs_libtpu
def test_the_step_of_a_page_is_compiled_and_counted(page, tmp_path, capsys):
    argv = ["plan", "--config", page, "--topology", "v5e:2x2", "--cache", str(tmp_path), "--json", str(tmp_path / "j")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "j").read_text())
    assert "fits, with" in out and found["fits"] and not found["from_cache"]
    # Full remat: of each product of a block 8 FLOPs per weight and token, but 6 of the last, which is not made again.
    block, last, head = 4 * 256 * 256 + 3 * 256 * 512, 256 * 512, 256 * 1024
    expected = (4 * (8 * block - 2 * last) + 6 * head) * 4 * 512 / 4
    assert found["flops"]["matmul"] == pytest.approx(expected, rel=1e-9)
    assert found["hbm"]["parameters"] == pytest.approx(4 * (4 * block + 2 * head) / 4, rel=0.01)
    assert found["hbm"]["optimizer"] == pytest.approx(2 * found["hbm"]["parameters"], rel=0.01)
    kinds = {kind.partition(" ")[0] for kind in found["collectives"]}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert found["days"] * found["tokens_per_day"] == pytest.approx(10 * 4 * 512)
    assert main(argv) == 0
    again = json.loads((tmp_path / "j").read_text())
    assert again.pop("from_cache") and found.pop("from_cache") is False and again == found
    program = tmp_path / found["program"] / "program.hlo.gz"
    program.write_bytes(program.read_bytes()[:1000])
    capsys.readouterr()
    assert main(argv) == 1 and f"{program.parent}: damaged" in capsys.readouterr().err


@needs_libtpu
def test_kernels_are_cast_layer_by_layer(page, tmp_path):
    sizes = dict(num_layers=6, embed_dim=2048, num_heads=16, mlp_dim=8192)
    larger = [f"--config.first.model.{name}={size}" for name, size in sizes.items()]
    found = figures_of(["--config", page, "--topology", "v5e:2x2", "--stage", "first", *larger], tmp_path)
    text = gzip.decompress((tmp_path / found["program"] / "program.hlo.gz").read_bytes()).decode()
    # What a device has of the kernels of all layers: in float32, and in bfloat16 of one layer at a time.
    for kernel in ("1024,8,128", "8,128,1024", "1024,4096", "4096,1024"):
        assert f"f32[6,{kernel}]" in text and f"bf16[6,{kernel}]" not in text


def figures_of(argv, tmp_path):
    assert main(["plan", *argv, "--cache", str(tmp_path), "--json", str(tmp_path / "j")]) == 0
    return json.loads((tmp_path / "j").read_text())


def test_a_mesh_of_the_command_line_takes_the_place_of_the_page_s(page, capsys):
    assert main(["plan", "--config", page, "--topology", "v5e:2x2", "--mesh", "fsdp=3"]) == 2
    assert "mesh data=1 x fsdp=3 x tensor=1 = 3 devices, but v5e:2x2 has 4" in capsys.readouterr().err


@needs_libtpu
def test_the_step_of_decoding_is_compiled_and_counted(page, tmp_path, capsys):
    found = figures_of(["--config", page, "--topology", "v5e:2x2", "--decode", "--batch-size", "8"], tmp_path)
    assert "one token for each of 8 rows of 512 tokens" in capsys.readouterr().out
    # Two FLOPs per weight and row, and per slot of the cache for scores and for values.
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 512) + 256 * 1024
    assert found["flops"]["model"] == pytest.approx(8 * (2 * weights + 4 * 4 * 2 * 128 * 512) / 4)
    assert found["flops"]["matmul"] == pytest.approx(8 * 2 * weights / 4, rel=1e-9)
    assert found["hbm"]["cache"] == pytest.approx(2 * 2 * 4 * 8 * 2 * 512 * 128 / 4, rel=0.01)
    assert found["hbm"]["parameters"] == pytest.approx(2 * (weights + 256 * 1024) / 4, rel=0.01)
    assert found["tokens_per_day"] * found["seconds"]["scheduled"] == pytest.approx(8 * 86400)


@needs_libtpu
def test_the_growth_of_a_page_is_compiled_and_counted(page, tmp_path, capsys):
    found = figures_of(["--config", page, "--topology", "v5e:2x2", "--stage", "grow"], tmp_path)
    assert "policy exact, with optimizer state" in capsys.readouterr().out
    block, ends = 4 * 256 * 256 + 3 * 256 * 512, 2 * 256 * 1024
    assert found["hbm"]["parameters"] == pytest.approx(4 * (3 * block + ends) / 4, rel=0.01)
    assert found["hbm"]["grown parameters"] == pytest.approx(4 * (4 * block + ends) / 4, rel=0.01)
    assert found["hbm"]["grown optimizer"] == pytest.approx(2 * found["hbm"]["grown parameters"], rel=0.01)
    assert found["hbm"]["needed"] >= sum(found["hbm"][k] for k in ("parameters", "optimizer", "grown parameters"))
    assert found["flops"]["matmul"] == 0 and "tokens_per_day" not in found


@needs_libtpu
def test_a_step_that_does_not_fit_says_by_how_much_and_what_would(page, tmp_path, capsys):
    larger = ["--config.first.model.embed_dim=8192", "--config.first.model.mlp_dim=65536"]
    argv = ["plan", "--config", page, "--topology", "v5e:2x2", "--cache", str(tmp_path), *larger]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "does not fit v5e:2x2" in err and "more than there is" in err and "chips would do" in err


@needs_libtpu
def test_a_stage_that_opens_masks_is_planned_with_them_and_without(page, tmp_path, capsys):
    masked = ["--config.grow.policy=msg", "--config.second.mask_start=2", "--config.second.mask_ramp=4"]
    found = figures_of(["--config", page, "--topology", "v5e:2x2", *masked], tmp_path)
    out = capsys.readouterr().out
    assert "masks on layers" in out and "the plain step, once the masks are dropped" in out
    assert found["masks"] == {"layers": 4} and found["plain"]["masks"] == {}
    assert found["program"] != found["plain"]["program"]
    # The masked step reads a number for every layer.
    text = gzip.decompress((tmp_path / found["program"] / "program.hlo.gz").read_bytes()).decode()
    entry = text[text.index("ENTRY") :]
    assert [line for line in entry.splitlines() if "= f32[4]{" in line and " parameter(" in line and "masks" in line]
    # Six of the ten steps have masks.
    assert found["stage_tokens"] == 6 * 4 * 512 and found["plain"]["stage_tokens"] == 4 * 4 * 512

"""Config pages: every mistake is said with its path and what to change."""

import pytest
from ml_collections import ConfigDict

import tele_jax as tele
from tele_jax.config import from_dict, to_dict
from tele_jax.errors import UserError
from tele_jax.settings import GrowStage, TrainStage, cache_config
from tele_jax.stages import run_config

MODEL = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=64)


def page():
    config = ConfigDict()
    config.run = ("first", "grow", "second")
    train = dict(
        kind="pretrain",
        data=dict(tokenizer="t.model", sources=dict(en=dict(files=("*.txt",)))),
        optimizer=dict(learning_rate=1e-3),
        steps=10,
        batch_size=4,
        seq_len=16,
    )
    config.first = dict(train, model=MODEL)
    config.grow = dict(kind="grow", model=dict(embed_dim=20), policy="msg")
    config.second = dict(train, mask_ramp=5)
    return config


def test_a_page_becomes_frozen_stages():
    run = run_config(page())
    assert run.run == ("first", "grow", "second")
    assert isinstance(run.stages["grow"], GrowStage)
    assert isinstance(run.stages["first"], TrainStage)
    assert run.stages["first"].model == tele.ModelConfig(**MODEL)
    with pytest.raises(AttributeError):
        run.stages["first"].steps = 11


def change(config, path, value):
    *tables, key = path.split(".")
    with config.unlocked():
        table = config
        for part in tables:
            table = table[part]
        if value is None:
            del table[key]
        else:
            if key in table:
                del table[key]
            table[key] = value


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("first.stpes", 5, r"config\.first\.stpes: unknown key of PretrainStage; did you mean 'steps'"),
        ("first.steps", None, r"config\.first\.steps: missing"),
        ("first.steps", "many", r"config\.first\.steps='many' must be a whole number"),
        ("first.steps", 0, r"config\.first: steps=0 must be above 0"),
        ("first.model.num_kv_heads", 3, r"config\.first\.model: num_heads=2 does not divide into num_kv_heads=3"),
        ("first.model.embed_dims", 3, r"config\.first\.model\.embed_dims: unknown key .* 'embed_dim'"),
        ("first.model.dtype", "float8", r"config\.first\.model\.dtype: 'float8' is not one of"),
        ("first.microbatches", 3, r"batch_size=4 does not divide into microbatches=3"),
        ("first.data.sources.en.rate", -1, r"config\.first\.data\.sources\.en: rate=-1"),
        ("first.data.sources.en.rate", 0, r"config\.first\.data: sources: rate=0 leaves every domain out"),
        ("first.data.sources.en.rate", float("inf"), r"config\.first\.data\.sources\.en: rate=inf must be 0 or above"),
        ("first.data.sources.en.files", (), r"config\.first\.data: sources\.en\.files must name at least one pattern"),
        ("first.data.sources", {}, r"config\.first\.data: sources must name at least one domain, or give cache"),
        ("first.data.sources", {"a/b": dict(files=("x",))}, r"config\.first\.data: sources: 'a/b' is no name"),
        ("first.kind", "train", r"config\.first\.kind: 'train' is not one of"),
        ("second.model", MODEL, r"config\.second\.model: only growth stages, and the first stage"),
        ("second.mask_ramp", 50, r"the mask ramp ends after the last step"),
        ("second.mask_ramp", 0, r"config\.second\.mask_ramp: .*policy 'msg'"),
        ("run", ("first", "gorw"), r"names the stage 'gorw', but config\.gorw is missing"),
        ("run", ("first",), r"config\.grow: unknown key"),
        ("run", ("grow", "first", "second"), r"the first stage, 'grow', grows"),
        ("first.model", None, r"config\.first\.model: missing"),
        ("first.mask_ramp", 2, r"config\.first\.mask_ramp: no growth comes right before"),
        ("second.mask_start", 6, r"the mask ramp ends after the last step: at 11 steps, but the stage has 10"),
        ("second.mask_order", ("embed", "mlp", "heads"), r"at 15 steps, but the stage has 10"),
        ("second.mask_order", "embed", r"config\.second: mask_order='embed' is neither 'together' nor a list of axes"),
        ("second.mask_order", 5, r"config\.second\.mask_order: expected a list, got 5"),
        ("second.mask_unit", "epochs", r"config\.second\.mask_unit: 'epochs' is not one of 'steps', 'tokens'"),
        ("second.mask_shape", "sine", r"config\.second\.mask_shape: 'sine' is not one of 'linear', 'cosine'"),
        ("first.mask_order", ("embed",), r"config\.first\.mask_order: no growth comes right before"),
        ("first.schedule", dict(kind="wsd", decay=0), r"config\.first\.schedule: decay=0 must be above 0"),
        ("run", 5, r"config\.run: expected a list, got 5"),
        ("run", ("first", "../grow"), r"'\.\./grow' is no name for a stage"),
        ("mesh", dict(fsdp=0), r"config\.mesh: fsdp=0 must be above 0"),
    ],
)
def test_a_mistake_is_named_with_its_path(path, value, match):
    config = page()
    change(config, path, value)
    with pytest.raises(UserError, match=match):
        run_config(config)


def test_what_a_stage_continues_is_followed_where_the_page_has_branches():
    """Adapters leave no moments to what goes on from them, and do not matter to a branch beside them."""
    made = page().to_dict()
    first = made["first"]
    train = {key: value for key, value in first.items() if key != "model"}
    lora, warm = train | {"lora": {"rank": 2}}, train | {"optimizer": {"learning_rate": 1e-3, "new_warmup_steps": 2}}
    grow = made["grow"] | {"policy": "exact"}

    def read(start=None, **stages):
        return run_config({"run": [*stages], "start": start, **stages})

    read(a=first, b=lora, g=grow | {"after": "a"}, c=warm)
    read(a=first, b=lora, c=warm | {"after": "a"})
    with pytest.raises(UserError, match=r"config\.d\.optimizer\.new_warmup_steps needs .* config\.b trains adapters"):
        read(a=first, b=lora, c=train | {"after": "a"}, g=grow | {"after": "b"}, d=warm)
    rule = r"config\.h\.after='g': a growth goes on after a training stage; "
    with pytest.raises(UserError, match=rf"{rule}those before h are a; name one of them"):
        read(a=first, g=grow, h=grow | {"after": "g"}, c=train)
    with pytest.raises(UserError, match=rf"{rule}there is none before h; leave it out"):
        read(g=grow, h=grow | {"after": "g"}, c=train, start="somewhere")


def test_a_mask_ramp_in_tokens_has_to_end_within_the_tokens_of_the_stage():
    config = page()
    change(config, "second.mask_unit", "tokens")
    change(config, "second.mask_ramp", 640)  # 10 steps of 4 rows of 16
    assert run_config(config).stages["second"].mask_ramp == 640
    change(config, "second.mask_ramp", 641)
    with pytest.raises(UserError, match=r"config\.second: the mask ramp ends .*: at 641 tokens, but the stage has 640"):
        run_config(config)


def test_with_a_cache_sources_and_files_may_be_left_out():
    config = page()
    change(config, "first.data", dict(tokenizer="t.model", cache="rows"))
    change(config, "second.data", dict(tokenizer="t.model", cache="rows", sources=dict(en=dict(rate=2))))
    run = run_config(config)
    assert run.stages["first"].data.sources == {} and run.stages["first"].data.cache == "rows"
    assert run.stages["second"].data.sources["en"].files == ()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(seq_len=0), r"config: seq_len=0 must be above 0"),
        (dict(seed=-1), r"config: seed=-1 must be in \[0, 2\^32\)"),
        (dict(kind="grow"), r"config\.kind: 'grow' is not one of 'pretrain', 'sft'"),
        (dict(shard_bytes=0), r"config: shard_bytes=0 must be above 0"),
        (dict(data=dict(tokenizer="t.model", cache="rows")), r"data\.cache: a cache is made from files"),
        (dict(data=None), r"config\.data: expected DataConfig or a table of its fields, got None"),
    ],
)
def test_a_page_for_a_cache_is_checked(changes, match):
    fields = dict(data=dict(tokenizer="t.model", sources=dict(en=dict(files=("*.txt",)))), seq_len=16)
    assert cache_config(fields).shard_bytes == 16 * 65_536
    with pytest.raises(UserError, match=match):
        cache_config({**fields, **changes})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(head_dim=None, num_heads=3), "embed_dim=16 does not divide into num_heads=3"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(padded_vocab_size=60), "padded_vocab_size=60 is below vocab_size=64"),
        (dict(rms_eps=0.0), "rms_eps=0.0 must be above 0"),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(fields, match):
    with pytest.raises(UserError, match=match):
        tele.ModelConfig(**{**MODEL, **fields})


@pytest.mark.parametrize("name", ["tele_flm_52b", "tele_flm_1t", "telechat_7b", "telechat_12b", "telechat_52b"])
def test_a_model_config_survives_json(name):
    cfg = tele.get_model(name)
    assert from_dict(tele.ModelConfig, to_dict(cfg)) == cfg


def test_an_unknown_published_model_names_the_nearest():
    with pytest.raises(UserError, match="unknown model 'tele_flm_52'; did you mean 'tele_flm_52b'"):
        tele.get_model("tele_flm_52")


def test_replacing_heads_keeps_multi_head_attention():
    cfg = tele.ModelConfig(**MODEL)
    assert cfg.replace(num_heads=3).num_kv_heads == 3
    assert cfg.replace(num_heads=4, num_kv_heads=2).num_kv_heads == 2

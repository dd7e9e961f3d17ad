"""E5: Tele-FLM in miniature: three stages on all four axes against from scratch, at equal FLOPs.

    tele lab run E5 --budget cpu

Real text at the budgets cpu and accelerator: `make quickstart` (or its first two commands) puts it in runs/quickstart/.
"""

from ml_collections import ConfigDict

from tele_jax import ModelConfig
from tele_jax.lab.paths import split_steps

# Layers 64 -> 80 -> 140, heads 64 -> 80 -> 160, mlp 21,824 -> 27,264 -> 98,304 (arXiv 2404.16645, 2407.02783): x 1.25
# and x 1.75, x 1.25 and x 2, x 1.25 and x 3.6. Here 1/16 of the layers and of the heads, in whole numbers.
SIZES = (
    dict(num_layers=4, embed_dim=32, num_heads=4, mlp_dim=85),
    dict(num_layers=5, embed_dim=40, num_heads=5, mlp_dim=107),
    dict(num_layers=9, embed_dim=80, num_heads=10, mlp_dim=384),
)
SMOKE_SIZES = (
    dict(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12),
    dict(num_layers=2, embed_dim=12, num_heads=3, mlp_dim=15),
    dict(num_layers=3, embed_dim=16, num_heads=4, mlp_dim=24),
)
# Tokens of the stages: 2.0T, 0.3T and 15.7B as published; the other split is ours, with most FLOPs at the final size.
SPLITS = {"published split": (2000.0, 300.0, 15.7), "even split": (40.0, 30.0, 30.0)}
STEPS = {"smoke": 12, "cpu": 300, "accelerator": 20_000}  # from scratch
TEXT, RATES = "runs/quickstart/text", {"en": 0.45, "zh": 0.3, "code": 0.25}


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke = budget == "smoke"
    sizes, seq_len, batch_size = (SMOKE_SIZES, 32, 4) if smoke else (SIZES, 128, 16)
    shared = dict(
        head_dim=sizes[0]["embed_dim"] // sizes[0]["num_heads"], vocab_size=432 if smoke else 4096, max_seq_len=256,
        mup_base_width=sizes[0]["embed_dim"], matrix_init_std=0.08, dtype="float32", remat="none",
    )  # fmt: skip
    models = [ModelConfig(**shared, **size) for size in sizes]
    scratch = STEPS[budget]

    def stage(steps: int, last: bool, first_model: dict | None, grown: bool) -> dict:
        warmup = max(1, min(20, steps // 10))
        schedule = dict(kind="wsd", warmup=warmup, decay=max(1, steps // 4)) if last else dict(
            kind="constant", warmup=warmup
        )  # fmt: skip
        made = dict(
            kind="pretrain", steps=steps, batch_size=batch_size, seq_len=seq_len, schedule=schedule,
            optimizer=dict(learning_rate=6e-3), log_every=max(1, min(20, steps)), checkpoint_every=max(1, steps // 2),
            eval_every=max(1, scratch // 30), keep_checkpoints=1,
        )  # fmt: skip
        if grown and not smoke:
            made["optimizer"]["new_warmup_steps"] = warmup
        return made | ({} if first_model is None else dict(model=first_model))

    final = stage(scratch, True, shared | sizes[2], False)
    arms = {"from scratch": dict(config=dict(run=["train"], train=final))}
    flops = split_steps(models[2:], [1], 1e30, batch_size=batch_size, seq_len=seq_len)  # steps of 1e30 FLOPs
    flops = 1e30 / flops[0] * scratch
    for name, shares in SPLITS.items():
        steps = split_steps(models, shares, flops, batch_size=batch_size, seq_len=seq_len)
        page = dict(run=["small", "grow_medium", "medium", "grow_large", "large"])
        page["small"] = stage(steps[0], False, shared | sizes[0], False)
        page["medium"], page["large"] = stage(steps[1], False, None, True), stage(steps[2], True, None, True)
        for grow, size in (("grow_medium", sizes[1]), ("grow_large", sizes[2])):
            page[grow] = dict(kind="grow", policy="exact", model=size, tolerance=1e-4)
        arms[name] = dict(config=page)
    if smoke:
        del arms["published split"]

    config = ConfigDict()
    config.name, config.kind, config.budget = "E5", "paths", budget
    config.title = "Tele-FLM in miniature: what do three stages save?"
    config.hypothesis = (
        "A model grown in three stages on all four axes reaches the held-out loss of the same model trained from "
        "scratch with at most 1/1.5 of its FLOPs."
    )
    config.claim = "Tele-FLM 52B was grown to 102B and 1T in three stages to save compute; growth gives 1.4x to 2.2x."
    config.source = "arXiv 2404.16645, 2407.02783 (stages); 2305.02869 (speed-ups)"
    config.seeds = (0, 1) if smoke else (0, 1, 2)
    sources = {
        domain: dict(
            files=[f"{TEXT}/{domain}/train.jsonl"], validation_files=[f"{TEXT}/{domain}/validation.jsonl"],
            format="jsonl", rate=rate,
        )
        for domain, rate in RATES.items()
    }  # fmt: skip
    data = "synthetic" if smoke else dict(
        tokenizer="runs/quickstart/tokenizer.model", sources=sources, eval_bytes=30_000
    )  # fmt: skip
    with config.unlocked():
        config.settings, config.arms = dict(baseline="from scratch", data=data), arms
    config.equal_compute = 0.1 if smoke else 0.02
    config.criteria = (
        dict(
            estimate="share of FLOPs: even split", side="below", threshold=1 / 1.5,
            says="the path with most FLOPs at the final size needs at most 1/1.5 of the FLOPs from scratch",
        ),
    )  # fmt: skip
    config.notes = (
        "All arms have the same learning rate, transferred between widths by muP from the smallest; no arm was tuned "
        "on its own.",
        "The proportions of the sizes are the published ones as far as whole heads and layers allow; the even split of "
        "tokens is ours.",
        "The final loss of the path from scratch has seen the decay of the learning rate, and so has the end of each "
        "path: most of what a path gains at its end is that decay. A path cannot be seen to reach that loss before its "
        "decay begins, so its share of FLOPs is bounded from below; a finished branch per share is not there yet.",
    )
    return config

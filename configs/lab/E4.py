"""E4: a model becomes wider in mid-training by ratios that are no integers, by every initialisation and warm-up.

tele lab run E4 --budget cpu
"""

from _paths import data, model, stage_of
from ml_collections import ConfigDict

from tele_jax import ModelConfig, count_params
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

# embed x 1.5, heads x 1.25, mlp x 1.4.
SIZES = {
    "smoke": (dict(embed_dim=8, num_heads=1, mlp_dim=10), dict(embed_dim=12, num_heads=2, mlp_dim=14)),
    "cpu": (dict(embed_dim=32, num_heads=4, mlp_dim=85), dict(embed_dim=48, num_heads=5, mlp_dim=119)),
    "accelerator": (dict(embed_dim=256, num_heads=32, mlp_dim=680), dict(embed_dim=384, num_heads=40, mlp_dim=952)),
}
LAYERS = {"smoke": 1, "cpu": 3, "accelerator": 8}
STEPS = {"smoke": 12, "cpu": 1000, "accelerator": 11_000}  # of the wider model, for the FLOPs of every arm
FALL = 0.2  # share of the steps, at the end, in which the rate falls
MARGIN = 0.5  # percent
BEST = "exact, new parameters warm up"


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke, sizes = budget == "smoke", SIZES[budget]
    shared = model(budget) | dict(head_dim=8, num_layers=LAYERS[budget])
    stage, warmup = stage_of(budget), 2 if smoke else 50
    wide = ModelConfig(**shared, **sizes[-1])
    tokens = stage["batch_size"] * stage["seq_len"] * STEPS[budget]
    made = dict(stage=stage | dict(eval_every=0 if smoke else STEPS[budget] // 6), warmup=warmup)
    made |= dict(ends=[flops_per_token(wide, stage["seq_len"]) * tokens])

    def widened(policy: str, *, new: int = 0, masks: int = 0, rewarm: int = 0) -> dict:
        after_growth = dict(optimizer=stage["optimizer"] | dict(new_warmup_steps=new)) | dict(mask_ramp=masks)
        how = dict(grow=dict(policy=policy), after_growth=after_growth, rewarm=rewarm, decay=2 * FALL)
        return arms.path(shared, sizes, (1, 1), **how, **made)

    paths = {
        BEST: widened("exact", new=warmup),
        "exact, all parameters warm up": widened("exact", rewarm=warmup),
        "exact, nothing warms up": widened("exact"),
        "msg": widened("msg", masks=warmup),
        "copy": widened("copy"),
        "random": widened("random", new=warmup),
        "from scratch": arms.path(shared, sizes[-1:], (1,), decay=FALL, **made),
    }
    if smoke:
        paths = dict(list(paths.items())[:2])

    config = ConfigDict()
    config.name, config.kind, config.budget = "E4", "paths", budget
    config.title = "Wider in mid-training: which initialisation, and what warms up?"
    config.hypothesis = (
        "In a growth of the width by ratios that are no integers, zeros on one side of what is new, which keep the "
        f"function, end at most {MARGIN}% of the loss above every other initialisation, and lower with a warm-up of "
        "the new parameters alone than with one of all parameters or none."
    )
    config.claim = (
        "One-sided zeros, which keep the function strictly, end within 0.0012 nats of the best initialisation; copies "
        "need something that tells them apart; only the new parameters are to be warmed up again."
    )
    config.source = "arXiv 2602.02472 (SPARKLING)"
    config.seeds = (0,) if smoke else (0, 1, 2, 3, 4)
    with config.unlocked():
        config.settings = dict(baseline=BEST, data=data(budget))
        config.arms = {name: dict(config=page) for name, page in paths.items()}
    config.equal_compute = 0.1 if smoke else 0.02
    rivals = [name for name in ("msg", "copy", "random") if name in paths]
    config.criteria = tuple(
        dict(
            estimate=f"relative difference: {name}", side="above", threshold=-MARGIN,
            says=f"{name}: ends less than {MARGIN}% lower than {BEST}",
        )
        for name in rivals
    ) + tuple(
        dict(
            estimate=f"relative difference: {name}", side="above", threshold=0.0,
            says=f"{name}: ends higher than where new parameters alone do",
        )
        for name in paths
        if name.startswith("exact") and name != BEST
    )  # fmt: skip
    config.notes = (
        f"The claim ranks initialisations, so that the baseline is {BEST}, and not from scratch, which is an arm of "
        "equal FLOPs. All arms are grown after half of their tokens, in the constant part of the schedule, by embed x "
        f"1.5, heads x 1.25, mlp x 1.4; the rate falls to 0 over the last {FALL:.0%} of the tokens. A warm-up and the "
        f"rise of the masks (msg) take {warmup} steps.",
        f"The published margin, 0.0012 nats, is below 0.1% of a loss. Seeds differ by more; {MARGIN}% is ours.",
        "Moments are kept in every arm. With random values the new parameters warm up. With policy copy nothing is new "
        "to the optimizer: a copy takes over moments and age, and nothing tells it from its source again.",
        f"From scratch sees {tokens / count_params(wide):.1f} tokens per parameter. No arm was tuned; all have the "
        "learning rate 6e-3.",
    )
    return config

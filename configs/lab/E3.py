"""E3: a model starts with one layer and is expanded once to its full depth, against from scratch on the same tokens.

tele lab run E3 --budget cpu
"""

from _paths import data, model, stage_of
from ml_collections import ConfigDict

from tele_jax import ModelConfig, count_params
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

WIDTH = {"smoke": 16, "cpu": 32, "accelerator": 256}
DEPTH = {"smoke": 2, "cpu": 6, "accelerator": 12}
STEPS = {"smoke": 12, "cpu": 1200, "accelerator": 11_000}
FALL = 0.2  # share of all steps, at the end, in which the rate falls
PLACES = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}  # of the steps, after which the model is expanded
EXPANSIONS = (
    ("stack", "a quarter"),
    ("stack", "half"),
    ("stack", "three quarters"),
    ("exact", "half"),
    ("random", "half"),
)
CLAIMED = 0.5  # percent


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke, width, depth, steps = budget == "smoke", WIDTH[budget], DEPTH[budget], STEPS[budget]
    shared = model(budget) | dict(embed_dim=width, num_heads=width // 8, mlp_dim=8 * width // 3)
    one, full = dict(num_layers=1), dict(num_layers=depth)
    stage, warmup = stage_of(budget) | dict(eval_every=0 if smoke else steps // 6), 2 if smoke else 50
    tokens = stage["batch_size"] * stage["seq_len"]  # of a step
    cost = {n: flops_per_token(ModelConfig(**shared, num_layers=n), stage["seq_len"]) * tokens for n in (1, depth)}

    def alone(size: dict) -> dict:
        ends = [steps * cost[size["num_layers"]]]
        return arms.path(shared, [size], (1,), ends, stage=stage, warmup=warmup, decay=FALL)

    def expanded(policy: str, at: float) -> dict:
        ends = [steps * (at * cost[1] + (1 - at) * cost[depth])]
        new = dict(optimizer=stage["optimizer"] | dict(new_warmup_steps=warmup))
        how = dict(grow=dict(policy=policy), after_growth=new, warmup=warmup, decay=FALL / (1 - at))
        return arms.path(shared, [one, full], (at, 1 - at), ends, stage=stage, **how)

    paths = {"from scratch": alone(full)}
    for policy, place in EXPANSIONS[1:2] if smoke else EXPANSIONS:
        paths[f"{policy} after {place}"] = expanded(policy, PLACES[place])
    if not smoke:
        paths["one layer alone"] = alone(one)

    config = ConfigDict()
    config.name, config.kind, config.budget = "E3", "paths", budget
    config.title = "Start with one layer, expand once: what is lost?"
    config.hypothesis = (
        "A model that starts with one layer and is expanded once to its full depth, in the constant part of a "
        f"warmup-stable-decay schedule, ends less than {CLAIMED}% above the held-out loss of the same model trained "
        "from scratch on the same tokens, even where it is expanded after three quarters of the steps."
    )
    config.claim = (
        "Training from zero or one layer and one expansion, late in the constant part, takes about a fifth of the "
        "compute (5x), and the loss is less than 0.5% higher at 124M parameters and 12 layers."
    )
    config.source = "arXiv 2511.04981"
    config.seeds = (0,) if smoke else (0, 1, 2, 3, 4)
    rates = {} if smoke else dict(learning_rates=(5e-3, 1e-2))
    with config.unlocked():
        config.settings = dict(baseline="from scratch", data=data(budget), tuning_seed=100)
        config.arms = {name: dict(config=page) | rates for name, page in paths.items()}
    config.criteria = tuple(
        dict(
            estimate=f"relative difference: stack after {place}", side="below", threshold=CLAIMED,
            says=f"with copies of the layer after {place} of the steps, the loss is less than {CLAIMED}% higher",
        )
        for place in PLACES
        if f"stack after {place}" in paths
    )  # fmt: skip
    seen = tokens * steps / count_params(ModelConfig(**shared, **full))
    least = 0.75 * cost[1] / cost[depth] + 0.25
    config.notes = (
        f"All arms see the same tokens, {seen:.1f} per parameter of the full depth, and their rate falls to 0 over "
        f"the last {FALL:.0%} of the steps. New parameters warm up over {warmup} steps.",
        f"A model of one layer costs {cost[1] / cost[depth]:.2f} of what one of {depth} does, so that an expansion "
        "after 75% of the steps takes "
        f"{least:.2f} of the FLOPs: {1 / least:.1f}x, and not the published 5x, can be had at this depth and width.",
        "From one layer, stack is the same as interleaving copies. One layer alone, for all tokens, says what depth is "
        "worth here at all: no expansion should lose more.",
    )
    return config

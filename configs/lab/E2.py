"""E2: a model of one layer becomes four layers deep, by every policy, against from scratch at equal FLOPs.

tele lab run E2 --budget cpu
"""

from _paths import BATCH, SEQ_LEN, STAGE, data, model
from ml_collections import ConfigDict

from tele_jax import ModelConfig
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

WIDTH = {"smoke": 16, "cpu": 48, "accelerator": 512}
STEPS = {"smoke": 12, "cpu": 1000, "accelerator": 40_000}  # from scratch
POLICIES = ("exact", "msg", "stack", "random")


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke, width = budget == "smoke", WIDTH[budget]
    depths = (1, 2) if smoke else (1, 4)
    warmup = 2 if smoke else 100
    shared = model(budget) | dict(embed_dim=width, num_heads=width // 8, mlp_dim=8 * width // 3)
    sizes = [dict(num_layers=depth) for depth in depths]
    flops = flops_per_token(ModelConfig(**shared, **sizes[-1]), SEQ_LEN) * BATCH * SEQ_LEN * STEPS[budget]
    made = dict(stage=STAGE, warmup=warmup, ends=[share * flops for share in ((1.0,) if smoke else (0.6, 1.0))])
    deep = dict(num_layers=depths[-1])
    new = dict(optimizer=STAGE["optimizer"] | dict(new_warmup_steps=warmup))

    def grown(policy: str, shares: tuple[float, float] = (75, 25), cooled: float = 0.0) -> dict:
        after_growth = dict(mask_ramp=warmup) if policy == "msg" else new
        how = dict(grow=dict(policy=policy), after_growth=after_growth, decay=0.6, cooled=cooled)
        return arms.path(shared, [sizes[0], deep], shares, **how, **made)

    paths = {"from scratch": arms.path(shared, sizes[-1:], (1,), decay=0.3, **made)}
    paths |= {policy: grown(policy) for policy in (("exact",) if smoke else POLICIES)}
    if not smoke:
        paths["exact, early"] = grown("exact", (40, 60))
        paths["exact, after decay"] = grown("exact", cooled=0.2)

    config = ConfigDict()
    config.name, config.kind, config.budget = "E2", "paths", budget
    config.title = "What does growth in depth save, by policy?"
    config.hypothesis = (
        "A model that is deepened fourfold in mid-training by policy exact reaches the held-out loss of the same model "
        "trained from scratch with at most 1/1.5 of its FLOPs, those of the small model included."
    )
    config.claim = "Stacking saves about half of the compute at equal loss, and identity blocks lose 2.5 points to it."
    config.source = "arXiv 2405.15319 (G_stack)"
    config.seeds = (0,) if smoke else (0, 1, 2)
    rates = {} if smoke else dict(learning_rates=(4e-3, 8e-3))
    with config.unlocked():
        config.settings = dict(baseline="from scratch", data=data(budget), tuning_seed=100)
        config.arms = {name: dict(config=page) | rates for name, page in paths.items()}
    config.equal_compute = 0.1 if smoke else 0.02
    config.criteria = (
        dict(
            estimate="share of FLOPs: exact", side="below", threshold=1 / 1.5,
            says="growth by policy exact needs at most 1/1.5 of the FLOPs from scratch",
        ),
    )  # fmt: skip
    config.notes = (
        "Tokens before and after the growth: 75 to 25, 40 to 60 where it is early. After decay: the rate falls to 0 in "
        "the last fifth of the small model's steps, and starts at its peak again behind the growth.",
        "From one layer, interleaving copies is the same as stacking them.",
        "Moments are kept; new parameters warm up over 100 steps, or their masks rise (msg).",
    )
    return config

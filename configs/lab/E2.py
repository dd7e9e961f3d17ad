"""E2: a model becomes ten layers deep, by every policy and from several depths, against from scratch at equal FLOPs.

tele lab run E2 --budget cpu
"""

from _paths import data, model, stage_of
from ml_collections import ConfigDict

from tele_jax import ModelConfig, count_params
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

WIDTH = {"smoke": 16, "cpu": 16, "accelerator": 128}
DEPTH = {"smoke": 2, "cpu": 10, "accelerator": 20}
TOKENS = {
    "smoke": (0.3,),
    "cpu": (5, 20),
    "accelerator": (20, 5, 80),
}  # per parameter, from scratch; the first: all arms
FACTORS = (1.25, 10)  # of the depth, beside 2, by policy exact


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke, width, depth = budget == "smoke", WIDTH[budget], DEPTH[budget]
    stage, warmup = stage_of(budget), 2 if smoke else 50
    shared = model(budget) | dict(embed_dim=width, num_heads=width // 8, mlp_dim=8 * width // 3)
    full = ModelConfig(**shared, num_layers=depth)
    new = dict(optimizer=stage["optimizer"] | dict(new_warmup_steps=warmup))

    def path(depths: tuple, shares: tuple, ends: tuple, tokens: float, decay: float, **how) -> dict:
        flops = flops_per_token(full, stage["seq_len"]) * tokens * count_params(full)
        sizes, ends = [dict(num_layers=layers) for layers in depths], (1.0,) if smoke else ends
        how |= dict(stage=stage, warmup=warmup, decay=decay)
        return arms.path(shared, sizes, shares, [end * flops for end in ends], **how)

    def scratch(tokens: float) -> dict:
        return path((depth,), (1,), (0.6, 1.0), tokens, 0.3)

    def grown(
        policy: str = "exact", factor: float = 2, shares: tuple = (75, 25), ends: tuple = (0.4, 0.6, 1.0),
        cooled: float = 0.0, tokens: float = TOKENS[budget][0],
    ) -> dict:  # fmt: skip
        how = dict(grow=dict(policy=policy), after_growth=dict(mask_ramp=warmup) if policy == "msg" else new)
        return path((round(depth / factor), depth), shares, ends, tokens, 0.6, cooled=cooled, **how)

    first, *others = TOKENS[budget]
    paths = {"from scratch": scratch(first), "exact": grown()}
    if not smoke:
        paths |= {policy: grown(policy, ends=(0.6, 1.0)) for policy in ("msg", "stack", "interleave", "random")}
        paths["exact, early"] = grown(shares=(40, 60), ends=(0.6, 1.0))
        paths["exact, after decay"] = grown(cooled=0.2, ends=(0.6, 1.0))
        paths |= {f"exact from depth {round(depth / factor)}": grown(factor=factor) for factor in FACTORS}
    tables = {name: dict(config=page) for name, page in paths.items()}
    for tokens in others:
        own = f"from scratch, {tokens} tokens"
        tables |= {own: dict(config=scratch(tokens), baseline=own)}
        tables |= {f"exact, {tokens} tokens": dict(config=grown(tokens=tokens), baseline=own)}

    config = ConfigDict()
    config.name, config.kind, config.budget = "E2", "paths", budget
    config.title = "What does growth in depth save, by policy?"
    config.hypothesis = (
        "A model that is deepened twofold in mid-training by policy exact reaches the held-out loss of the same model "
        "trained from scratch with at most 1/1.5 of its FLOPs, those of the small model included."
    )
    config.claim = "Stacking saves about half of the compute at equal loss, and identity blocks lose 2.5 points to it."
    config.source = "arXiv 2405.15319 (G_stack)"
    config.seeds = (0,) if smoke else (0, 1, 2, 3, 4)
    rates = {} if smoke else dict(learning_rates=(6e-3, 1.2e-2))
    with config.unlocked():
        config.settings = dict(baseline="from scratch", data=data(budget), tuning_seed=100)
        config.arms = {name: table | rates for name, table in tables.items()}
    config.equal_compute = 0.1 if smoke else 0.02
    config.criteria = (
        dict(
            estimate="share of FLOPs: exact", side="below", threshold=1 / 1.5,
            says="growth by policy exact needs at most 1/1.5 of the FLOPs from scratch",
        ),
    )  # fmt: skip
    more = " and ".join(map(str, others)) or "no other number"
    config.notes = (
        f"From scratch sees {first} tokens per parameter; the arms that name a number of tokens are of {more}, and are "
        "compared with from scratch of that number.",
        f"Models become {depth} layers deep: from {depth // 2} (twofold) where the arm does not name another depth. "
        "stack repeats the whole stack, interleave puts each copy beside its source; both change the function.",
        "Tokens before and after the growth: 75 to 25, 40 to 60 where it is early. After decay: the rate falls to 0 in "
        "the last fifth of the small model's steps, and starts at its peak again behind the growth. In the large model "
        "it falls over 60% of the steps, from scratch over 30%.",
        f"Moments are kept; new parameters warm up over {warmup} steps, or their masks rise (msg).",
    )
    return config

"""E5: Tele-FLM in miniature: three stages on all four axes against from scratch, at equal FLOPs.

tele lab run E5 --budget cpu
"""

from _paths import BATCH, SEQ_LEN, STAGE, data, model
from ml_collections import ConfigDict

from tele_jax import ModelConfig, count_params
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

# Layers 64 -> 80 -> 140, heads 64 -> 80 -> 160, mlp 21,824 -> 27,264 -> 98,304 (arXiv 2404.16645, 2407.02783): x 1.25
# and x 1.75, x 1.25 and x 2, x 1.25 and x 3.6. Here 1/32 of the layers and of the heads, as whole numbers.
SIZES = (
    dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=43),
    dict(num_layers=3, embed_dim=24, num_heads=3, mlp_dim=64),
    dict(num_layers=4, embed_dim=40, num_heads=5, mlp_dim=192),
)
SMOKE_SIZES = (
    dict(num_layers=1, embed_dim=8, num_heads=1, mlp_dim=12),
    dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=20),
)
# Tokens of the stages: 2.0T, 0.3T and 15.7B as published; the other split is ours, with most FLOPs at the final size.
PUBLISHED, OURS = (2000.0, 300.0, 15.7), (70.0, 15.0, 15.0)
ENDS = (0.35, 0.6, 0.9)  # shares of the FLOPs from scratch at which the other paths are finished
STEPS = {"smoke": 12, "cpu": 1000, "accelerator": 60_000}  # from scratch


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke = budget == "smoke"
    sizes = SMOKE_SIZES if smoke else SIZES
    warmup = 2 if smoke else 50
    shared = model(budget) | dict(head_dim=8)
    final = ModelConfig(**shared, **sizes[-1])
    flops = flops_per_token(final, SEQ_LEN) * BATCH * SEQ_LEN * STEPS[budget]

    def path(sizes: tuple, shares: tuple, ends: tuple, **how) -> dict:
        ends = (1.0,) if smoke else ends
        return arms.path(shared, sizes, shares, [end * flops for end in ends], stage=STAGE, warmup=warmup, **how)

    how = dict(decay=0.6, after_growth=dict(optimizer=STAGE["optimizer"] | dict(new_warmup_steps=warmup)))
    paths = {"from scratch": path(sizes[-1:], (1,), (0.6, 1.0), decay=0.3)}
    paths["our split"] = path(sizes, OURS[-len(sizes) :], ENDS, **how)
    if not smoke:
        paths["published split"] = path(sizes, PUBLISHED, ENDS, **how)
        paths["smallest size alone"] = path(sizes[:1], (1,), ENDS, decay=0.3)

    config = ConfigDict()
    config.name, config.kind, config.budget = "E5", "paths", budget
    config.title = "Tele-FLM in miniature: what do three stages save?"
    config.hypothesis = (
        "A model grown in three stages on all four axes reaches the held-out loss of the same model trained from "
        "scratch with at most 1/1.5 of its FLOPs."
    )
    config.claim = "Tele-FLM 52B was grown to 102B and 1T in three stages to save compute; growth gives 1.4x to 2.2x."
    config.source = "arXiv 2404.16645, 2407.02783 (stages); 2305.02869 (speed-ups)"
    config.seeds = (0,) if smoke else (0, 1, 2, 3, 4, 5)
    rates = {} if smoke else dict(learning_rates=(3e-3, 6e-3, 1.2e-2, 2.4e-2))
    with config.unlocked():
        config.settings = dict(baseline="from scratch", data=data(budget), tuning_seed=100)
        config.arms = {name: dict(config=page) | rates for name, page in paths.items()}
    config.equal_compute = 0.1 if smoke else None  # the other paths end at 0.9 of the FLOPs from scratch
    config.criteria = (
        dict(
            estimate="share of FLOPs: our split", side="below", threshold=1 / 1.5,
            says="the path with our split of tokens needs at most 1/1.5 of the FLOPs from scratch",
        ),
    )  # fmt: skip
    tokens = BATCH * SEQ_LEN * STEPS[budget] / count_params(final)
    config.notes = (
        f"From scratch sees {tokens:.1f} tokens per parameter. That is little for a model of its size; at the FLOPs of "
        "the three published stages, 1083.7B parameters from scratch would see 0.13 (derived). With more tokens per "
        "parameter, growth from so small a model saves less.",
        "Tokens of the three stages are 70 : 15 : 15, ours; published are 2000 : 300 : 15.7. In the last size the rate "
        "falls to 0 over 60% of the steps, from scratch over 30%; new parameters warm up over 50 steps.",
        "The published split spends 71% of its FLOPs at the first size, 24% at the second and 5% at the last. The "
        "smallest size alone, at the same FLOPs, says what growth adds to a small model that is trained for long.",
    )
    return config

"""E6: what becomes of Adam's moments in a growth, and of the rate of what is new.

tele lab run E6 --budget cpu
"""

from _paths import BATCH, SEQ_LEN, STAGE, data, model
from ml_collections import ConfigDict

from tele_jax import ModelConfig
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

SIZES = (
    dict(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=85),
    dict(num_layers=3, embed_dim=48, num_heads=6, mlp_dim=128),
)
SMOKE_SIZES = (
    dict(num_layers=1, embed_dim=8, num_heads=1, mlp_dim=12),
    dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=20),
)
STEPS = {"smoke": 12, "cpu": 800, "accelerator": 20_000}  # of the larger size, for the FLOPs of each arm


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke = budget == "smoke"
    sizes, warmup = SMOKE_SIZES if smoke else SIZES, 2 if smoke else 100
    shared = model(budget) | dict(head_dim=8)
    flops = flops_per_token(ModelConfig(**shared, **sizes[-1]), SEQ_LEN) * BATCH * SEQ_LEN * STEPS[budget]

    def arm(kept: bool = True, new_warmup: int = 0, **optimizer) -> dict:
        adam = STAGE["optimizer"] | optimizer
        after_growth = dict(optimizer=adam | dict(new_warmup_steps=new_warmup))
        how = dict(grow=dict(optimizer_state=kept), after_growth=after_growth, warmup=warmup, decay=0.6)
        return dict(
            config=arms.path(
                shared,
                sizes,
                (1, 1),
                [flops],
                stage=STAGE | dict(optimizer=adam, eval_every=2 if smoke else 100),
                **how,
            )
        )

    ways = {
        "kept, new parameters warm up": arm(new_warmup=warmup),
        "kept": arm(),
        "reset": arm(kept=False),
        "kept, old counts": arm(bias_correction="state"),
        "kept, old counts, new parameters warm up": arm(new_warmup=warmup, bias_correction="state"),
        "kept, new parameters warm up, larger beta2": arm(new_warmup=warmup, beta2=0.999),
        "kept, old counts, larger beta2": arm(beta2=0.999, bias_correction="state"),
        "reset, larger beta2": arm(kept=False, beta2=0.999),
    }
    if smoke:
        ways = dict(list(ways.items())[1:3])

    config = ConfigDict()
    config.name, config.kind, config.budget = "E6", "paths", budget
    config.title = "What becomes of Adam's moments in a growth?"
    config.hypothesis = (
        "After a growth, keeping the moments and warming up only the new parameters ends lower than new moments."
    )
    config.claim = (
        "Old moments are copied, new ones are zero, the step count is kept (MSG); re-warm only the new parameters "
        "(SPARKLING)."
    )
    config.source = "arXiv 2305.02869 (MSG), 2602.02472 (SPARKLING)"
    config.seeds = (0,) if smoke else (0, 1, 2, 3, 4)
    with config.unlocked():
        config.settings, config.arms = dict(baseline=next(iter(ways)), data=data(budget)), ways
    config.equal_compute = 0.01
    config.criteria = (
        dict(
            estimate="difference: reset", side="above", threshold=0.0,
            says="new moments end with a higher loss than kept ones",
        ),
    )  # fmt: skip
    config.notes = (
        "beta2 is 0.95, and 0.999 where it is larger. No arm was tuned; all have the learning rate 6e-3.",
        "Old counts: new entries, whose moments are 0, have the step count of old ones (bias_correction='state'), so "
        "that Adam hardly corrects them. Their first step is then 0.45 times as large as with their own count where "
        "beta2 is 0.95, and 3.2 times where it is 0.999. Elsewhere every entry counts its own steps.",
    )
    return config

"""E9: does a grown model forget less in fine-tuning than the same model trained from scratch?

tele lab run E9 --budget cpu
"""

from _paths import SOURCES, TEXT, data, model, stage_of
from ml_collections import ConfigDict

from tele_jax import ModelConfig
from tele_jax.lab import arms
from tele_jax.train.step import flops_per_token

LARGE = {
    "smoke": dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=20),
    "cpu": dict(num_layers=4, embed_dim=40, num_heads=5, mlp_dim=192),
    "accelerator": dict(num_layers=16, embed_dim=512, num_heads=64, mlp_dim=2048),
}
SMALL = {  # ratios that are no integers
    "smoke": dict(num_layers=1, embed_dim=8, num_heads=1, mlp_dim=12),
    "cpu": dict(num_layers=3, embed_dim=24, num_heads=3, mlp_dim=64),
    "accelerator": dict(num_layers=10, embed_dim=320, num_heads=40, mlp_dim=1000),
}
STEPS = {"smoke": 8, "cpu": 1000, "accelerator": 20_000}  # of the large model, for the FLOPs of each arm
TUNING = {"smoke": 2, "cpu": 150, "accelerator": 2000}  # steps of fine-tuning
RATES = {"smoke": (1e-3,), "cpu": (1e-4, 3e-4, 1e-3, 3e-3), "accelerator": (1e-4, 3e-4, 1e-3, 3e-3)}
NEW = {
    "zh": SOURCES["en"] | {key: [f"{TEXT}/zh/{part}.jsonl"] for key, part in
                           (("files", "train"), ("validation_files", "validation"))}
}  # fmt: skip


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke, large, stage = budget == "smoke", LARGE[budget], stage_of(budget)
    warmup = 2 if smoke else 50
    shared = model(budget) | dict(head_dim=8)
    tokens = stage["batch_size"] * stage["seq_len"] * STEPS[budget]
    flops = flops_per_token(ModelConfig(**shared, **large), stage["seq_len"]) * tokens

    def path(sizes: list, shares: tuple, ends: tuple, rate: float, **how) -> dict:
        optimizer = stage["optimizer"] | dict(learning_rate=rate)
        new = dict(optimizer=optimizer | dict(new_warmup_steps=warmup))
        how = dict(stage=stage | dict(optimizer=optimizer), warmup=warmup, after_growth=new) | how
        return dict(config=arms.path(shared, sizes, shares, [end * flops for end in ends], **how))

    grown = dict(decay=0.6, shares=(70, 30), ends=(1.0,), rate=1.2e-2)
    paths = {
        "from scratch": path([large], (1,), (1.0,) if smoke else (0.4, 1.0), 6e-3, decay=0.3),
        "grown on all axes": path([SMALL[budget], large], **grown),
    }
    claimed = ["grown on all axes"] if smoke else ["grown on all axes", "stacked"]
    if not smoke:
        half = large | dict(num_layers=large["num_layers"] // 2)
        paths["stacked"] = path([half, large], **grown, grow=dict(policy="stack"))
        paths["from scratch, rate of grown"] = path([large], (1,), (1.0,), grown["rate"], decay=0.3)

    config = ConfigDict()
    config.name, config.kind, config.budget = "E9", "forgetting", budget
    config.title = "Does a grown model forget less in fine-tuning?"
    config.hypothesis = (
        "Fine-tuned on another language, a grown model forgets less of what it was trained on than the same model "
        "trained from scratch with the same FLOPs, also where both have learned as much of the new language."
    )
    config.claim = (
        "A model of 7B parameters that was trained by stacking consistently degrades less over a sequence of "
        "fine-tuning tasks than one without growth."
    )
    config.source = "arXiv 2509.01213 (Mitigating Catastrophic Forgetting in Continual Learning through Model Growth)"
    config.seeds = (0,) if smoke else (0, 1, 2, 3)
    tuning = {key: value for key, value in stage.items() if key != "optimizer"} | dict(
        steps=TUNING[budget], reset_optimizer=True, schedule=dict(kind="linear", warmup=warmup // 2, final=0.0)
    )
    with config.unlocked():
        text = data(budget)
        read = dict(data=text, new="synthetic") if smoke else dict(data=text | dict(eval_bytes=20_000), new=NEW)
        config.settings = dict(baseline="from scratch", tuning=tuning, learning_rates=RATES[budget]) | read
        config.arms = paths
    config.equal_compute = 0.1 if smoke else 0.02
    compared = {
        "forgetting": "at the same FLOPs",
        "forgetting at equal gain": "where both have gained as much on the new domain",
    }
    config.criteria = tuple(
        dict(estimate=f"{how}: {arm}", side="below", threshold=0.0, says=f"{arm} forgets less than from scratch {says}")
        for arm in claimed
        for how, says in compared.items()
    )
    config.notes = (
        "Equal compute answers what a user sees who pays for training and fine-tuning. A model that is worse before "
        "has less to forget: equal loss holds an arm against the line of forgetting over loss of the branches from "
        "scratch, which is extrapolated where the arm's loss lies beyond them. A model that learns less of the new "
        "domain forgets less, too: equal gain holds both where they have gained 90% of the smaller of their largest "
        "gains.",
        "Old domains are English and code, the new one is Chinese. The tokenizer was trained on the old ones, so that "
        "a Chinese character is three bytes, whose tokens training has hardly seen: before, they cost more than 8 "
        "bits. Fine-tuning trains all parameters, with new moments; the rate falls to 0.",
        "The learning rates of training are those that E5 chose: 0.006 from scratch, 0.012 grown; stacked has that of "
        "grown. A higher one leaves larger weights, which the same fine-tuning moves less: the arm from scratch at the "
        "rate of grown says how much of a difference that is.",
    )
    return config

"""E7: which layers to copy when a model gets deeper, and how early a choice can be told from the loss.

tele lab run E7 --budget cpu
"""

from _paths import data, model, stage_of
from ml_collections import ConfigDict

LAYERS = {"smoke": (4, 5), "cpu": (6, 9), "accelerator": (16, 24)}
WIDTH = {"smoke": 8, "cpu": 32, "accelerator": 512}
# Steps of the source, of the probes, and of the decay at the end.
STEPS = {"smoke": (2, (2,), 1), "cpu": (800, (16, 112), 64), "accelerator": (20_000, (16, 112), 2000)}
DRAWS = {"smoke": (0, 1), "cpu": (2, 4), "accelerator": (3, 6)}
FUNCTION = {"exact": "copies begin as identity", "interleave": "copies take part at once"}


def get_config(budget: str = "cpu") -> ConfigDict:
    layers, width, (source, probes, decay) = LAYERS[budget], WIDTH[budget], STEPS[budget]
    stage = stage_of(budget)
    size = dict(num_layers=layers[0], embed_dim=width, num_heads=max(1, width // 8), mlp_dim=8 * width // 3)

    def page(policy: str) -> dict:
        """The page of one choice of layers."""
        constant = lambda steps, warmup=0: dict(steps=steps, schedule=dict(kind="constant", warmup=warmup))  # noqa: E731
        warmup = min(50, source // 2)
        falls = dict(kind="linear", final=0.0) if budget != "smoke" else dict(kind="constant")  # the program of probe_1
        end = stage | dict(steps=decay, schedule=falls)
        stages = dict(
            source=stage | dict(model=model(budget) | size) | constant(source, warmup),
            grow=dict(kind="grow", policy=policy, model=dict(num_layers=layers[1])),
            **{f"probe_{i}": stage | constant(steps) for i, steps in enumerate(probes, start=1)},
            end_1=end,
        )
        if budget != "smoke":
            stages["end_2"] = end | dict(after=f"probe_{len(probes)}", seed=1, data=dict(restart=True))  # another order
        return dict(run=list(stages)) | stages

    config = ConfigDict()
    config.name, config.kind, config.budget = "E7", "layer_choice", budget
    config.title = "Which layers to copy, and how early one can tell"
    config.hypothesis = (
        "Copying the layers that change their input least ends lower than copying layers at random; the loss right "
        "after the growth does not rank the choices as the finished loss does, and 128 steps later it does."
    )
    config.claim = (
        "Layers to duplicate are chosen by the distance between what enters and what leaves them; to preserve the "
        "function is no goal of training."
    )
    config.source = "arXiv 2407.02783 (choice by distance; smallest first is ours), 2405.15319 (G_stack)"
    policies = {"interleave": FUNCTION["interleave"]} if budget == "smoke" else FUNCTION
    config.seeds = (0,) if budget == "smoke" else (0, 1, 2)
    sampled, random = DRAWS[budget]
    named = ("distance", "uniform") if budget == "smoke" else ("distance", "uniform", "middle", "last", "first")
    with config.unlocked():
        text = data(budget)
        text = text if isinstance(text, str) else text | dict(eval_bytes=20_000)
        config.settings = dict(data=text, named=named, sampled=sampled, random=random)
        config.arms = {policy: dict(config=page(policy)) for policy in policies}
    last = sum(probes)
    config.criteria = (
        *(
            dict(
                estimate=f"distance against random: {policy}", side="below", threshold=0.0,
                says=f"{says}: the smallest changes first end lower than random layers do in the mean",
            )
            for policy, says in policies.items()
        ),
        dict(
            estimate="rank correlation at 0: interleave", side="below", threshold=0.5,
            says="copies take part at once: the loss right after the growth does not predict the rank at the end",
        ),
        *(
            dict(
                estimate=f"rank correlation at {last}: {policy}", side="above", threshold=0.5,
                says=f"{says}: the loss {last} steps after the growth predicts the rank at the end",
            )
            for policy, says in policies.items()
        ),
    )  # fmt: skip
    config.notes = (
        "By policy exact all choices begin at the loss of the source; by interleave each copy stands after its source "
        "and takes part at once. Learning rates were not tuned.",
        "sampled: layers are drawn with a probability in proportion to 1 / distance; random: with equal ones. The "
        "distance is 1 - cosine on held-out text; the one that Tele-FLM used is not published.",
        "The finished loss is the mean of two ends, which part after the last probe and read the text in other orders. "
        "The rank correlation of the two ends says how much of a finished rank belongs to the choice and not to the "
        "order of the text; where it is low, the finished ranks themselves are uncertain.",
    )
    return config

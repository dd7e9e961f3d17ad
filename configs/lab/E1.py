"""E1: which initialisations of new units leave them without a gradient, or equal to another for ever.

tele lab run E1 --budget cpu
"""

from ml_collections import ConfigDict

MODEL = dict(
    num_layers=2, embed_dim=16, num_heads=4, head_dim=4, mlp_dim=22, vocab_size=64, max_seq_len=64, remat="none",
    dtype="float32",
)  # fmt: skip
ALL = dict(num_layers=3, embed_dim=20, num_heads=5, mlp_dim=29)  # no ratio is an integer
TWICE = dict(embed_dim=32, num_heads=8, mlp_dim=44)
ARMS = {
    "exact": dict(growth=ALL),
    "msg": dict(growth=ALL, policy="msg"),
    "random": dict(growth=ALL, policy="random", mistake="policy"),
    "stack": dict(growth=dict(num_layers=4), policy="stack", mistake="policy"),
    "copies, twice as wide": dict(growth=TWICE, policy="copy"),
    "both sides zero": dict(growth=ALL, mistake="both sides zero"),
}


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke = budget == "smoke"
    config = ConfigDict()
    config.name, config.kind, config.budget = "E1", "units", budget
    config.title = "Can everything new learn?"
    config.hypothesis = (
        "500 steps after a growth by policy exact or msg, every new unit has a gradient and differs from all others; "
        "exact copies stay copies, and units with zeros on both sides stay dead."
    )
    config.claim = "One side zero keeps the function and learns; exact copies with copied moments stay copies for ever."
    config.source = "arXiv 2602.02472 (SPARKLING); 2305.02869 (MSG)"
    config.seeds = (0,) if smoke else (0, 1, 2)
    config.settings = dict(model=MODEL, warmup=5 if smoke else 50, steps=(0, 3) if smoke else (0, 1, 2, 10, 100, 500))
    with config.unlocked():
        config.arms = {name: arm for name, arm in ARMS.items() if not smoke or name == "exact"}
    config.criteria = [
        dict(estimate=f"{what}: {arm}", side=side, threshold=0.5, says=f"policy {arm}: {says}")
        for arm, what, side, says in (
            ("exact", "dead", "below", "no new unit is dead"),
            ("exact", "locked", "below", "no new unit is locked"),
            ("msg", "dead", "below", "no new unit is dead"),
            ("msg", "locked", "below", "no new unit is locked"),
            ("copies, twice as wide", "locked", "above", "copies stay copies"),
            ("both sides zero", "dead", "above", "what is zero on both sides stays dead"),
        )
        if arm in config.arms
    ]
    return config

"""E0: every operator and policy of growth keeps the function exactly, and known mistakes are caught.

tele lab run E0 --budget cpu
"""

from ml_collections import ConfigDict

MODEL = dict(
    num_layers=2, embed_dim=16, num_heads=4, head_dim=4, mlp_dim=22, vocab_size=40, max_seq_len=64, remat="none",
)  # fmt: skip
ALL = dict(num_layers=3, embed_dim=20, num_heads=5, mlp_dim=29)  # no ratio is an integer
GROUPS = dict(num_kv_heads=2)
EXTRAS = dict(output_biases=True, embed_norm=True, mup_base_width=8, output_mult=0.7)

EXACT = {
    "embed": dict(growth=dict(embed_dim=20)),
    "embed, epsilon kept by rule": dict(growth=dict(embed_dim=20), epsilon="keep"),
    "heads": dict(growth=dict(num_heads=5)),
    "heads in groups": dict(model=GROUPS, growth=dict(num_heads=6, num_kv_heads=2)),
    "groups split": dict(model=GROUPS, growth=dict(num_heads=6, num_kv_heads=6)),
    "mlp": dict(growth=dict(mlp_dim=29)),
    "layers": dict(growth=dict(num_layers=3)),
    "vocabulary": dict(growth=dict(vocab_size=47)),
    "multipliers": dict(growth=dict(input_mult=1.5, output_mult=0.3)),
    "all axes": dict(growth=ALL),
    "all axes, biases, norms, muP": dict(model=EXTRAS, growth=ALL),
    "all axes, tied": dict(model=dict(tie_embeddings=True), growth=ALL),
    "all axes, msg": dict(growth=ALL, policy="msg"),
    "all axes, copy": dict(growth=ALL, policy="copy"),
    "twice as wide, copy": dict(growth=dict(embed_dim=32, num_heads=8, mlp_dim=44), policy="copy"),
}
WRONG = {
    "embed, scale forgotten": dict(growth=dict(embed_dim=20), mistake="scale forgotten"),
    "embed, epsilon kept": dict(growth=dict(embed_dim=20), mistake="epsilon kept"),
    "embed, circular copy": dict(growth=dict(embed_dim=20), policy="copy", mistake="circular copy"),
    "heads appended across groups": dict(model=GROUPS, growth=dict(num_heads=6), mistake="heads appended"),
    "layers stacked": dict(growth=dict(num_layers=3), policy="stack", mistake="policy"),
    "all axes, random": dict(growth=ALL, policy="random", mistake="policy"),
}
SMOKE = ("embed", "embed, scale forgotten")  # one program serves both


def get_config(budget: str = "cpu") -> ConfigDict:
    smoke = budget == "smoke"
    dtypes = ("float32",) if smoke else ("float32", "bfloat16", "float64")
    config = ConfigDict()
    config.name, config.kind, config.budget = "E0", "exactness", budget
    config.title = "Is growth exact?"
    config.hypothesis = (
        "Growth along any axis, by any ratio, leaves the function of a model as it was in three dtypes, and each of "
        "the known mistakes is caught."
    )
    config.claim = "Masked structures are strictly function-preserving; exact zero-sided growth needs no masks."
    config.source = "arXiv 2305.02869 (MSG); docs/growth.md for policy exact"
    config.seeds = (0, 1) if smoke else (0, 1, 2)
    config.settings = dict(model=MODEL)
    with config.unlocked():
        config.arms = {
            f"{name} {dtype}": dict(arm, dtype=dtype)
            for dtype in dtypes
            for name, arm in {**EXACT, **WRONG}.items()
            if not smoke or name in SMOKE
        }
    config.criteria = (
        dict(
            estimate="worst exact growth", side="below", threshold=0.0,
            says="no exact growth moves logits or a part by more than rounding explains",
        ),
        dict(
            estimate="altered leaves", side="below", threshold=0.5,
            says="every entry is what the plan says, to the bit",
        ),
        dict(
            estimate="units that cannot learn", side="below", threshold=0.5,
            says="no new unit is dead or locked, where the policy promises that",
        ),
        dict(
            estimate="least mistake", side="above", threshold=0.0,
            says="each mistake moves logits or a part by more than rounding explains",
        ),
    )  # fmt: skip
    config.notes = (
        "Parts are compared in float64 without the rounding of products, so that a mistake too small for the logits of "
        "bfloat16 is seen all the same.",
    )
    return config

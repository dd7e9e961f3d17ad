"""Select 3,000 of 34,000 dialogues: rules, copies, clusters of hashed features, and a quota for maths.

    tele data fetch pool --out runs/pool
    tele sft select --config configs/data/select_pool.py --out runs/selected --workers 2

With a model, of which the directory is given: --config.model.checkpoint=W --config.clusters.features=states
"--config.stages=('rules','duplicates','difficulty')" --config.clusters.within=k_centre. What each key means:
tele_jax/selection/settings.py; docs/fine_tuning.md tells about the stages.
"""

from ml_collections import ConfigDict

POOL = "runs/pool"


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.sources = dict(pool=dict(files=(f"{POOL}/*/train.jsonl",), format="dialogues"))
    config.count = 3_000
    config.seed = 0
    config.stages = ("rules", "duplicates")
    config.rules = dict(any_end=("reading",))  # whose answers are quotations
    config.method = "clusters"
    config.clusters = dict(count=100, features="hashed", within="random")
    config.quotas = dict(maths=300)  # the other categories share what is left
    config.balance = "equal"
    return config

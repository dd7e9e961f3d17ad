"""The muP proxy of Tele-FLM: width 512 instead of 8,192, all else equal; one run of the search (arXiv 2404.16645).

    tele train --config configs/tele_flm_proxy.py --workdir W --config.pretrain.optimizer.learning_rate=3e-4

Published: sizes, 50,000 steps a run, 9 combinations; the values that won are the defaults here, at base width 512 (see
configs/tele_flm_52b.py). Searched were learning rate, init std and the output multiplier:
--config.pretrain.optimizer.matrix_learning_rate, --config.pretrain.model.matrix_init_std, .model.output_mult.
Ours: the batch, a sixteenth of the large model's, and that the cosine ends with the run.
"""

from ml_collections import ConfigDict

from tele_jax.config import to_dict
from tele_jax.published import get_model


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.run = ("pretrain",)
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.pretrain = dict(
        kind="pretrain",
        model=to_dict(get_model("tele_flm_proxy")),
        data=dict(tokenizer="tokenizer.model", cache="CACHE"),
        steps=50_000,
        batch_size=84,
        seq_len=4_096,
        optimizer=dict(
            learning_rate=1.5e-4, matrix_learning_rate=2.4e-3, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=1.0
        ),
        schedule=dict(kind="cosine", warmup=2_000, final=0.1),
        checkpoint_every=5_000,
    )
    return config

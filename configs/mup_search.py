"""Search of muP's settings on a proxy: a model of width 32 and real text.

    tele mup search --config configs/mup_search.py --out runs/mup_search
    tele mup transfer runs/mup_search --width 128 --out w128.py
    tele train --config w128.py --workdir runs/w128

`make quickstart`, or its first two commands, make text and tokenizer. A grid has the product of all lists: at first
search two or three keys, then the others around what was found.
"""

from ml_collections import ConfigDict

TEXT, TOKENIZER = "runs/quickstart/text/en", "runs/quickstart/tokenizer.model"


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.run = ("proxy",)
    config.proxy = dict(
        kind="pretrain",
        model=dict(
            num_layers=2, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=64, vocab_size=4096, max_seq_len=64,
            init_std=0.1, matrix_init_std=0.177, mup_base_width=32, dtype="float32", remat="none",
        ),
        data=dict(
            tokenizer=TOKENIZER, eval_bytes=20_000,
            sources=dict(
                en=dict(
                    files=(f"{TEXT}/train.jsonl",), validation_files=(f"{TEXT}/validation.jsonl",), format="jsonl"
                )
            ),
        ),
        optimizer=dict(learning_rate=2**-6),
        schedule=dict(kind="cosine", warmup=20),
        steps=200, batch_size=8, seq_len=64, log_every=10, eval_every=200, checkpoint_every=200, keep_checkpoints=1,
    )  # fmt: skip
    # Tele-FLM searched both rates, both standard deviations and the multipliers, nine combinations (arXiv 2404.16645).
    # Ranges are ours.
    config.search = dict(
        space=dict(
            learning_rate=[2**-7, 2**-6, 2**-5],
            matrix_learning_rate=[2**-8, 2**-7, 2**-6],
            output_mult=[1.0, 4.0],
        ),
        sampler="grid",
    )
    return config

"""The text of `tele data fetch quickstart` as a cache of pretraining rows.

    tele data cache --config configs/data/quickstart.py --out runs/quickstart/rows

The tokenizer is that of the quickstart: `make quickstart`, or

    tele tokenizer train --preset tele_flm --vocab-size 4096 --out runs/quickstart/tokenizer.model \
        'runs/quickstart/text/*/train.jsonl'
"""

from ml_collections import ConfigDict

TEXT = "runs/quickstart/text"
RATES = {"en": 0.45, "zh": 0.3, "code": 0.25}  # as configs/quickstart.py


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.kind = "pretrain"
    config.seq_len = 128
    config.seed = 0
    config.data = dict(
        tokenizer="runs/quickstart/tokenizer.model",
        sources={
            domain: dict(
                files=(f"{TEXT}/{domain}/train.jsonl",),
                validation_files=(f"{TEXT}/{domain}/validation.jsonl",),
                format="jsonl",
                rate=rate,
            )
            for domain, rate in RATES.items()
        },
    )
    return config

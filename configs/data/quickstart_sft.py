"""The dialogues of `tele data fetch quickstart` as a cache of fine-tuning rows: whole dialogues, answers learned.

    tele data cache --config configs/data/quickstart_sft.py --out runs/quickstart/dialogue_rows

The tokenizer: see quickstart.py beside this page.
"""

from ml_collections import ConfigDict

TEXT = "runs/quickstart/text/dialogues"


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.kind = "sft"
    config.seq_len = 128
    config.seed = 0
    config.data = dict(
        tokenizer="runs/quickstart/tokenizer.model",
        sources=dict(
            dialogues=dict(
                files=(f"{TEXT}/train.jsonl",), validation_files=(f"{TEXT}/validation.jsonl",), format="dialogues"
            )
        ),
    )
    return config

"""What the pages of training paths share: the model, the text, and the settings of a stage.

Real text at the budgets cpu and accelerator: `make quickstart` (or its first two commands) puts it in runs/quickstart/.
"""

TEXT = "runs/quickstart/text"
BATCH, SEQ_LEN = 4, 128  # small batches: more steps for the same compute

STAGE = dict(
    kind="pretrain", batch_size=BATCH, seq_len=SEQ_LEN, optimizer=dict(learning_rate=6e-3), log_every=100,
    checkpoint_every=2000, keep_checkpoints=1,  # evaluated at its start and its end: held-out text costs time, too
)  # fmt: skip
SOURCES = {
    domain: dict(
        files=[f"{TEXT}/{domain}/train.jsonl"], validation_files=[f"{TEXT}/{domain}/validation.jsonl"], format="jsonl"
    )
    for domain in ("en", "code")
}


def stage_of(budget: str) -> dict:
    """Settings of a stage, with larger batches at `accelerator`, so that tens of tokens per parameter are few steps."""
    return STAGE | (dict(batch_size=64, seq_len=256) if budget == "accelerator" else {})


def data(budget: str) -> dict | str:
    """English and code with a small tokenizer, so that the FLOPs lie in the layers; made-up text at `smoke`."""
    size = 16_384 if budget == "accelerator" else 512
    return "synthetic" if budget == "smoke" else dict(vocab_size=size, sources=SOURCES, eval_bytes=40_000)


def model(budget: str) -> dict:
    """Fields that all models of a study share."""
    vocab_size = {"smoke": 432, "cpu": 512, "accelerator": 16_384}[budget]
    return dict(vocab_size=vocab_size, max_seq_len=256, dtype="float32", remat="none")

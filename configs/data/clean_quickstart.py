"""Clean the quickstart's text: English, Chinese and code of packages, with every stage that needs no trained model.

    tele data fetch quickstart --out runs/quickstart/text
    tele data clean --config configs/data/clean_quickstart.py --out runs/quickstart/clean

More workers: --workers 2. Another runner: --runner DataflowRunner --beam=--project=P --beam=--region=R ..., with files
and --out at gs://. What each key means: tele_jax/clean/settings.py; docs/clean.md tells about the stages.
"""

from ml_collections import ConfigDict

TEXT = "runs/quickstart/text"


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Where two sources hold the same, that of the lower rank keeps it. A source whose language is known says so.
    config.sources = dict(
        en=dict(files=(f"{TEXT}/en/train.jsonl",), format="jsonl", domain="WebText", rank=0),
        zh=dict(files=(f"{TEXT}/zh/train.jsonl",), format="jsonl", domain="WorldKnowledge", rank=1),
        code=dict(files=(f"{TEXT}/code/train.jsonl",), format="jsonl", domain="Code", rank=2, language="code"),
    )
    # In this order. TeleChat and Tele-FLM name these steps; duplicates go before paragraphs, since a
    # document that has lost its paragraphs is like no other any more.
    config.stages = (
        "extract", "language", "normalise", "rules", "urls", "duplicates", "paragraphs", "overlap", "privacy", "safety",
    )  # fmt: skip
    config.language = dict(keep=("en", "zh", "code"))
    config.rules = dict(
        # Wikipedia's introductions are short: Gopher asks for 50, and among them for two of eight stop words.
        en=dict(min_tokens=30, min_stop_words=1),
        zh=dict(min_tokens=15, min_stop_words=0),  # and so are idioms, some of them without a function word
    )
    config.duplicates = dict(threshold=0.7, bands=25, rows=5, ngram=5)
    # A benchmark that must not be trained on; held-out text stands for one here.
    config.overlap = dict(files=(f"{TEXT}/en/validation.jsonl",), min_matches=3)
    config.privacy = dict(kinds=("email", "phone", "id", "ip", "card"), skip_languages=("code",))
    config.safety = dict(words=("online casino", "澳门赌场", "代开发票"), max_hits=2)
    config.output = dict(compression="none")  # training and `tele data cache` read it as it is; "gz" for what is kept
    return config

"""Clean a crawl: WARC files and records of HTML, with a quality classifier and n-gram models trained before.

    tele data clean-train quality --good wiki/*.jsonl --bad crawl-sample/*.jsonl --out runs/web/quality.npz
    tele data clean-train ngrams wiki/en.jsonl --out runs/web/en.npz
    tele data clean-train ngrams wiki/zh.jsonl --out runs/web/zh.npz
    tele data clean --config configs/data/clean_web.py --out runs/web/clean

Thresholds of the two models are ours, set by benchmarks/clean_models.py (figures in docs/clean.md) so that about 1%
goes of genuine text of kinds that no model has seen: poems, plays, a dictionary, manual pages. At a probability of 0.5
it would be 71% of the Chinese, at a perplexity of 3,000 91% of the English. They hold for models of a few MB of text;
more text gives lower perplexities. Look at the report's samples, then set yours.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.sources = dict(
        encyclopedia=dict(files=("wiki/*.jsonl",), format="jsonl", domain="WorldKnowledge", rank=0),
        crawl=dict(files=("crawl/*.warc.gz",), format="warc", domain="WebText", rank=1),
        pages=dict(
            files=("pages/*.jsonl.zst",), format="jsonl", html=True, text_field="html", domain="WebText", rank=2,
            encodings=("utf-8", "gb18030"),
        ),
    )  # fmt: skip
    config.stages = (
        "extract", "language", "normalise", "rules", "urls", "duplicates", "paragraphs", "quality", "perplexity",
        "overlap", "privacy", "safety",
    )  # fmt: skip
    config.quality = dict(model="runs/web/quality.npz", threshold=0.01)
    config.perplexity = dict(
        models=dict(en="runs/web/en.npz", zh="runs/web/zh.npz"),
        max_perplexity=dict(en=20_000.0, zh=50_000.0),
        min_perplexity=dict(en=5.0, zh=3.0),  # 1% of held-out text is below 51 and 10
    )
    config.overlap = dict(files=("benchmarks/*.jsonl",), fields=("question", "choices"))
    config.safety = dict(files=("words/*.txt",))
    return config

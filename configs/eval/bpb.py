"""Bits per byte on the held-out text of the quickstart, of one model or several side by side.

    tele eval bpb runs/quickstart/run --config configs/eval/bpb.py --out runs/quickstart/bits_per_byte
    tele eval table runs/quickstart/bits_per_byte

Name your domains as the Tele-FLM report does, and its averages are computed: WebText, Github, Wikipedia, Book, ArXiv
and StackExchange for English; WebText, Code, Book, WorldKnowledge, QA, Classical and Professional for Chinese. Where a
page has both, en.WebText and zh.WebText say which.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.text = {domain: (f"runs/quickstart/text/{domain}/validation.jsonl",) for domain in ("en", "zh", "code")}
    config.resamples = 1000
    config.seed = 0
    return config

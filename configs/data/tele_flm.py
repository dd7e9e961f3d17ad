"""The published pretraining mixture of Tele-FLM (arXiv 2404.16645), English to Chinese about 2 to 1.

    tele data clean --config CLEAN_PAGE --out corpora          what it writes is where this page looks
    tele data cache --config configs/data/tele_flm.py --out CACHE
    tele data cache --config configs/data/tele_flm.py:WebText,Code --out CACHE                       these domains alone
    tele data cache --config configs/data/tele_flm.py --out CACHE --config.data.sources.Book.rate=0  all but this one

Where your text is: change CORPORA, or the patterns of single domains. A new domain is five lines:

    config.data.sources["Poetry"] = dict(
        files=("corpora/Poetry/*.jsonl",),
        format="jsonl",
        rate=0.1,
    )

A rate is a share of the tokens. How many epochs of a domain that makes depends on how much text you have: `tele data
stats CACHE --tokens 2e12` says it. Published for 2T tokens: Book 0.8, Profession-Math 2.0, WorldKnowledge and
ClassicalChinese 2.5, all others 1.0.
"""

from ml_collections import ConfigDict

from tele_jax.errors import UserError

CORPORA = "corpora"
TOKENIZER = "tokenizer.model"
RATES = {  # percent of the tokens, and the published size on disk
    "WebText": 75.21,  # en, zh: 5.9 TB
    "Code": 9.81,  # code, zh: 528.1 GB
    "Book": 7.17,  # en, zh: 647.6 GB
    "WorldKnowledge": 2.87,  # multi, en, zh: 67.5 GB
    "QA": 2.12,  # en, zh: 159.2 GB
    "AcademicPaper": 0.99,  # en: 54.4 GB
    "Profession-Law": 1.04,  # zh: 84.2 GB
    "Profession-Math": 0.62,  # math: 6.1 GB
    "Profession-Patent": 0.14,  # zh: 10.4 GB
    "Profession-Medical": 0.02,  # zh: 1.2 GB
    "ClassicalChinese": 0.02,  # zh: 0.5 GB
}


def get_config(domains: str = ",".join(RATES)) -> ConfigDict:
    chosen = domains.split(",")
    unknown = [name for name in chosen if name not in RATES]
    if unknown:
        raise UserError(f"{unknown[0] or 'an empty name'}: not one of the published domains, {', '.join(RATES)}")
    config = ConfigDict()
    config.kind = "pretrain"
    config.seq_len = 4096  # published
    config.seed = 0
    config.data = dict(
        tokenizer=TOKENIZER,
        sources={
            domain: dict(
                files=(f"{CORPORA}/{domain}/[0-9]*.jsonl",),
                validation_files=(f"{CORPORA}/{domain}/validation*.jsonl",),
                format="jsonl",
                rate=rate,
            )
            for domain, rate in RATES.items()
            if domain in chosen
        },
    )
    return config

"""Selection of dialogues for fine-tuning from a pool. `tele sft select`.

settings.py   the config page as frozen dataclasses
samples.py    files as numbered samples, in chunks that are worked on apart
rules.py      what a sample must not be: truncated, in another language than its question, ...
features.py   features without a model: hashed character n-grams, TF-IDF, SVD
scores.py     a model's scores: losses with and without the question, states
choice.py     quotas, clusters, and the choice among what is left
pipeline.py   all of it, run into a directory; results of finished chunks are kept
output.py     the manifest and the report
"""

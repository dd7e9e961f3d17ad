"""From text files to training rows. Light to import: TensorFlow, seqio and sentencepiece load on use.

vocabulary.py            load_vocabulary(path): text to ids and back
vocabulary_training.py   training one, with the published special ids
sources.py               the files of a domain: checked, indexed, read
dialogue.py              TeleChat's template: messages to tokens and loss weights
examples.py              a document or a dialogue as inputs, targets and loss weights
packing.py               examples into rows of fixed length
tasks.py                 seqio: Task, Mixture, FeatureConverter, its registries (this one needs TensorFlow)
feed.py                  open_feed, LiveFeed and held_out: batches for training and evaluation
caching.py               `tele data cache`: a cache of rows, by Beam or without
shards.py                  what one worker does: files to a shard of packed rows
records.py                 a row as bytes
cache.py                   the cache on disk: manifest, checks, reading rows at random
order.py                 which row of which domain comes when, as a pure function
cached_feed.py           CachedFeed: batches from a cache
stats.py, looking.py     figures and a picture of a cache; a row as text
corpora.py               real text that every machine can get, to try things on
clean/                   raw text to deduplicated, screened documents (Beam)
"""

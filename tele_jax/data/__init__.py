"""From text files to training rows. Light to import: TensorFlow, seqio and sentencepiece load on use.

vocabulary.py            load_vocabulary(path): text to ids and back; vocabulary_base.py is the interface
vocabulary_training.py   training a vocabulary with the published special ids
templates.py             the markers around questions and answers, by family
messages.py              what the messages of a dialogue may say, and the weight of an answer
dialogue_formats.py      records of OpenAI's, ShareGPT's, Alpaca's and TeleChat's formats as messages
preferences.py           records of pairs, rankings and prompts, for alignment
dialogue.py              messages to tokens and loss weights, in a template; dialogue_encoder.py has its strings
documents.py             documents in text files: reading, cutting, rejecting
sources.py               the index of a domain's files; Indexes shares and keeps them
encode.py                the one encoder: documents, dialogues and Tasks to inputs, targets and loss weights
packing.py               examples into rows of fixed length, live or for a cache, and rows as bytes
order.py                 which row or document comes when, as a pure function; positions in the data
corpus_documents.py      the documents of files, encoded; long dialogues as several samples
domains.py               what a DataConfig names, resolved, checked and opened
task_documents.py        registered seqio Tasks as domains
task_features.py         what the features of such Tasks have to be
tasks.py                 domains as seqio Tasks and Mixtures
shuffled_domains.py      several domains shuffled together, with copies of each dialogue in an epoch
feed.py                  open_feed: batches, live, or rows that are read at random
live_rows.py             rows that are read live, with where they are from, to be shown
batches.py               the data of a training stage, opened once, with held-out text
records.py               pairs and prompts of a domain, checked and encoded
record_rows.py           pairs and prompts as rows in memory, and the data of a stage that reads them
shards.py, caching.py    `tele data cache`: one worker's part, and all of it
cache.py                 a cache on disk: manifest, checks, reading rows at random
describe.py              figures and a picture of a cache; a row as text
"""

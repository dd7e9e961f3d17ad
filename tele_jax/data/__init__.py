"""From text files to training rows. Light to import: TensorFlow, seqio and sentencepiece load on use.

vocabulary.py            load_vocabulary(path): text to ids and back
vocabulary_training.py   training one, with the published special ids
sources.py               the files of a domain: checked, indexed, read
dialogue.py              TeleChat's template: messages to tokens and loss weights
examples.py              a document or a dialogue as inputs, targets and loss weights
packing.py               examples into rows of fixed length
tasks.py                 seqio: Task, Mixture, FeatureConverter (this one needs TensorFlow)
feed.py                  LiveFeed and held_out: batches for training and evaluation
corpora.py               real text that every machine can get, to try things on
clean/                   raw text to deduplicated, screened documents (Beam)
"""

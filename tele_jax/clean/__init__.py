"""Cleaning: from crawled or collected text to deduplicated, screened documents. `tele data clean`.

Functions on documents, which need no Beam (but for files at addresses such as gs://):
  document.py     Document, Drop, and Tally: what a stage did, with samples
  reading.py      files of any format as documents; what cannot be read or decoded as rejects
  text.py         HTML to text; normalisation; en, zh, code or another language
  hashing.py      tokens and n-grams as 64-bit hashes: what every counting stage stands on
  duplicates.py   copies of pages, documents and paragraphs
  models.py       a classifier of quality and n-gram models: trained, saved, applied
  screening.py    n-grams of benchmarks, word lists, masks of personal identifiers
  stages.py       heuristic rules on length, symbols, repetition, stop words; all functions here as a page's stages
Around them:
  settings.py     the config page as frozen dataclasses
  transforms.py   stages as Beam PTransforms on batches of documents
  pipeline.py     all of it, composed and run into a directory that appears when it is complete
  output.py       shards, the manifest and the report
"""

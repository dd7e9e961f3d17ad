"""Cleaning: from crawled or collected text to deduplicated, screened documents. `tele data clean`.

Functions on documents, which need no Beam (but for files at addresses such as gs://):
  document.py     Document, Drop, and Tally: what a stage did, with samples
  reading.py      files of any format as documents; what cannot be read or decoded as rejects
  extract.py      HTML to text; normalisation
  language.py     en, zh, code or other
  rules.py        heuristic rules on length, symbols, repetition, stop words
  hashing.py      tokens and n-grams as 64-bit hashes: what every counting stage stands on
  urls.py         one spelling of an address
  duplicates.py   exact, SimHash and MinHash keys of a document; candidates, verification, components
  paragraphs.py   those that an earlier document had
  quality.py      a hashed linear classifier: trained, saved, applied
  ngrams.py       an interpolated Kneser-Ney model over hashed n-grams: trained, saved, perplexity
  overlap.py      n-grams of benchmarks
  privacy.py      masks of personal identifiers
  safety.py       word lists
  stages.py       the functions above, with a page's thresholds, as stages
Around them:
  settings.py     the config page as frozen dataclasses
  transforms.py   stages as Beam PTransforms on batches of documents
  pipeline.py     all of it, composed and run into a directory that appears when it is complete
  writing.py      shards and the manifest
  report.py       report.json and report.html
"""

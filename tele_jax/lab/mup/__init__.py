"""muP (arXiv 2203.03466, 2304.06875): is it right, which settings are best on a small model, and what will they give?

coords.check(cfg)       do activations keep their size when the width grows? With muP, and without
widths.at_width         a model at another width
search.py, transfer.py  trials of settings on a small model, and the page of a larger width with those found
predict.py              the loss of large widths from the losses of small ones
"""

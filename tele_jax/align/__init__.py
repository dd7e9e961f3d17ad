"""Alignment below its stages.

pairs.py        what reward models and DPO share: settings, scores, log-probabilities of answers, evaluation
reference.py    log-probabilities by a reference model, computed once and kept
scoring.py      `tele score-reward`
rewards.py      rewards of replies
rollouts.py     rollouts that stages train on
"""

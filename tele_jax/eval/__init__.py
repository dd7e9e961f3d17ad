"""Evaluation of a model: bits per byte, the field's harness, judged dialogue, and the published tables."""

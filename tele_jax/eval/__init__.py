"""Evaluation: bits per byte on held-out text."""

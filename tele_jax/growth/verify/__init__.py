"""Verification of a growth: comparison (entries, parts, liveness), division among processes (spread), report."""

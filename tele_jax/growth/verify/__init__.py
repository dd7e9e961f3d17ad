"""Verification of a growth: what is compared (entries, moments, parts, liveness), divided (spread) and reported."""

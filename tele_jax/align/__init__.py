"""Alignment below its stages: rewards of replies (rewards.py), and rollouts that stages train on (rollouts.py)."""

"""Ahead-of-time compilation of a step for a TPU slice that is not there: does it fit, and what bounds its time?"""

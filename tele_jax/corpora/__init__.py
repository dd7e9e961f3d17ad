"""Real text that Python packages carry, for the quickstart, the notebooks and the benchmarks."""

"""Paper hardware: compiles a step for a TPU slice that is not there, and says whether it fits and what it costs."""

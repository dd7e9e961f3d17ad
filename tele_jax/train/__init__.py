"""Training: optimizer, schedule, the sharded step, and the loop that runs the stages of a config."""

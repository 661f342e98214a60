"""Training: optimizer, schedule, one step, evaluation, metrics, checkpoints."""

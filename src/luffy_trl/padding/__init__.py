"""Leaving out padding, for any GRPOTrainer: rows ordered by length, micro-batches trimmed, sequences packed."""

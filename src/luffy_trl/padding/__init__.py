"""Leaving out padding and waits, for any GRPOTrainer: rows dealt by length, cut to it, packed, metrics read late."""

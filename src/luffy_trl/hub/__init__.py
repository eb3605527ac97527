"""Pushing to the Hub, which can never stop a run, and the model card."""

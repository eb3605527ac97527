"""What any run needs, whatever it trains: whole checkpoints, stopping, the recipe, secrets that stay secret."""

"""The base model, its adapter, and log-probabilities under both."""

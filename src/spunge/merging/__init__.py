"""Merge branches: rules (pure functions on tensors) and the engine that streams them over a checkpoint."""

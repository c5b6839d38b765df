"""The model on disk: checkpoint folders, deltas, adapters, and other models as differences from a base."""

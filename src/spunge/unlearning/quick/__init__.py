"""Cheaper forms of a model's layers for training: the same values up to rounding, in fewer passes and with less kept."""

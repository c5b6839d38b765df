"""Attribute sources that ask a model: which group of texts a row belongs to, where no column says."""

"""Evaluators: each measures a model on its own rows, item by item; statistics turn items into scores with intervals."""

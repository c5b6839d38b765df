"""Attacks on a model that has forgotten, one file each."""

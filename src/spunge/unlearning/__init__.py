"""Unlearning methods: each turns the base and one part's samples into what the part's branch changes."""

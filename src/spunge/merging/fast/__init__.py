"""The compiled path of the merge."""

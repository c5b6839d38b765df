"""The recipe: its frame, how it is read, and how an error in it is told."""

"""What a run takes of a device: told from shapes alone, and checked by a few steps where that is asked for."""

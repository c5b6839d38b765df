"""Who makes the stages of a run, one file per kind."""

"""The model in memory: loading it, its architecture, its parameters' names."""

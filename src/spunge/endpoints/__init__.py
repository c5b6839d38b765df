"""Chat models behind OpenAI-compatible endpoints: what a recipe says of one, how it is asked, and what it answered before."""

"""Pre-training of language models."""

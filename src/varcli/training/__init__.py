"""Training of both stages on one device: tokenizer, then transformer."""

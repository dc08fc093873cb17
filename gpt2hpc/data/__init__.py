"""From text to the tokens of a step: tokenizer, sources, shards, manifest, order, loader."""

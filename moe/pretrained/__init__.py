"""Released models in and out: checkpoint files, the layouts of model families, tokenizers."""

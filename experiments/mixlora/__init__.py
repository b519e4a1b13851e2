"""MixLoRA against LoRA and its peers: one task at a time, and all at once."""

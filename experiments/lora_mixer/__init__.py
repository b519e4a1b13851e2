"""LoRA-Mixer: adapters of single tasks as experts, mixed by routers that learn from little data."""

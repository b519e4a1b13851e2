"""One router per file. Each file offers `make(num_experts, top_k, ...)`, so that a config can name it."""

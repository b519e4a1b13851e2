"""The few products that must be fast; each file holds its reference, its CPU path and its GPU path side by side."""

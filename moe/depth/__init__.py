"""Depth routing of a frozen model: blocks are skipped, executed or repeated (Dr.LLM, arXiv 2510.12773)."""

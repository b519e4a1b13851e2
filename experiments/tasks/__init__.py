"""Labelled tasks read out of pinned packages: every one a list of `Example`, split by hash."""

"""Low-rank adapters of a frozen model, alone or as experts that a router mixes."""

"""Speed, measured as ratios inside one run: against a peer, another commit, and the machine's own matmul peak."""

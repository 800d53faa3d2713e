"""`python -m benchmarks compare`: ours and the peers on the same work, side by side."""

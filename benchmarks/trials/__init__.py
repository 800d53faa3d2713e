"""The trials of `benchmarks.faults`: what they train, how they break it, how they look at what is left."""

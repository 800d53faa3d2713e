"""Checkpoints on the disk: whole or absent, found by their place, one run to a folder."""

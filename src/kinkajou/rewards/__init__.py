"""Judges: one float for each sample."""

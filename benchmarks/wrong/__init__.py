"""Inputs that are wrong on purpose, each with what must be said about it."""

"""Measurements against other frameworks; nothing here is part of the package."""

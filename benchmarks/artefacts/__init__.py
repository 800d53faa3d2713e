"""Folders as an attacker would make them, each a change of a good one; nothing here is ever loaded by the maker."""

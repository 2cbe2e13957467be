"""Tokenizers that lie beside shards and runs: their interface, both kinds, and their folder. Imports no torch."""

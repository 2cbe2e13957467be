"""Tokenizers: their interface, both kinds, and the folder in which shards and runs keep one. Imports no torch."""

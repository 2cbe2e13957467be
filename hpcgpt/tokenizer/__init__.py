"""Tokenizers: their interface, both kinds, where they come from, and the folder in which shards and runs keep one.

Imports no torch.
"""

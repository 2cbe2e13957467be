"""Bytes to documents: file formats, encodings, separators, and an account of what is left out."""

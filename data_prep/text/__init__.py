"""Bytes to documents: files of every format, their encodings, separators and what is left out of them."""

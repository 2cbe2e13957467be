"""Weights & Biases: the interface for training, and the separate process that sends rows. Imports no torch."""

"""Weights & Biases: the side of training, and the process beside it that sends rows. Imports no torch."""

"""The GPT: blocks, attention and its kernels, the loss, and text generated from it. Knows nothing of runs and ranks."""

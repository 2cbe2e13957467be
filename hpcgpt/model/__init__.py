"""The GPT: blocks, attention and its kernels, the loss, and text generation. Independent of runs and ranks."""

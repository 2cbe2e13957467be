"""Weights of a run in the formats of Hugging Face, nanoGPT and llm.c, checked before they get their name."""

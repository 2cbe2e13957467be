"""Checkpoints: format, saving, loading, verifying, removing. `python -m hpcgpt.checkpoint ls|verify|show RUN`."""

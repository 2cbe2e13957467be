"""Checkpoints: their layout on disk, saving, loading, which ones stay. `python -m hpcgpt.checkpoint ls|verify|show
RUN`.
"""

"""Evaluation on tasks: multiple choice and last-word questions from local files."""

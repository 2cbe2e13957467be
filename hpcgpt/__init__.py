"""hpcgpt pretrains GPT models on a Slurm cluster. Start reading at ``hpcgpt/train.py``."""

__version__ = "0.1.0"

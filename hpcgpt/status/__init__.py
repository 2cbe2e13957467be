"""`hpcgpt status`: the state and figures of runs, from their folders and Slurm's queue; as a table, a text, JSON, or a
live view in a terminal. It only reads, and imports no torch.
"""

"""The health check: what is wrong with this machine, this Slurm or a node, before a run finds out."""

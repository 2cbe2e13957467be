"""What Slurm is asked and told: a job, its next start, the nodes that it keeps away from. Imports no torch."""

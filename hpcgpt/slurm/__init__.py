"""Questions to Slurm, and decisions about a job: whether it runs again, and on which nodes. Imports no torch."""

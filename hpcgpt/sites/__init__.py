"""What is known of a cluster before a job is queued: the site files in slurm/sites, and what follows from them."""

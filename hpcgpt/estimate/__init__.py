"""What a run will need, before it is queued: memory of a rank, time, GPU hours, disk; no GPU is used."""

"""What a process prints: escaped for terminals, and written by background threads, so that it can never end a run."""

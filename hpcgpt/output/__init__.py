"""What a process prints: escaped for terminals, written in the background, and never able to end a run."""

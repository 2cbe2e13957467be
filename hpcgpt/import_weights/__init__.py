"""Weights of other programs: read, checked, and written as a run folder that ``run.init_from`` takes."""

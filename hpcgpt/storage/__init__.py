"""Atomic files, and the lease by which one attempt at a time writes into a run folder. Imports no torch."""

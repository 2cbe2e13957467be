"""The fault-injection test: a run with faults must end with the same bytes as an undisturbed run. Imports no torch."""

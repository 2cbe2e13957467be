"""The fault-injection test: a run that faults hit has to end with the bytes of one without any. Imports no torch."""

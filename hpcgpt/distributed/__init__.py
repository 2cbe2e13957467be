"""The ranks of a job: rank discovery, rendezvous, collectives that share errors, and stopping at the same step."""

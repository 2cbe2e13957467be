"""Training: one attempt at a run, its loop and steps, evaluation, and the detection of spikes, stragglers and hangs.

It loads torch, so import it late.
"""

"""The run folder: its small files, metrics and events, and what they say of attempts, faults and time. Imports no
torch.
"""

"""The run folder: its small files, metrics and events, and the attempts, faults and goodput computed from them. Imports
no torch.
"""

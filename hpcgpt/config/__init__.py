"""Every option of a run, where its value comes from, and what a path or a name in it stands for. Imports no torch."""

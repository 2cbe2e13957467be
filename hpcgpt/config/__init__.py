"""Every option of a run, where its value comes from, and how paths and names are expanded. Imports no torch."""

"""Other programs' token files: reading them, and cutting their stream into documents."""

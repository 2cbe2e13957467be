"""Other programs' token files: reading them, and splitting their tokens into documents."""

"""A run as a model of lm-evaluation-harness (the extra `lm-eval`)."""

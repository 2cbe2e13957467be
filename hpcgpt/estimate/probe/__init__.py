"""A short real run that measures how long steps, evaluations and saves take, and the table of what was measured."""

"""Documents to shards, restartable: the plan, its units of work, the processes that make them, and the data set."""

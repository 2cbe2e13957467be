"""Ids to shards: the plan, its units of work, which process does them, and what becomes of them. Restartable."""

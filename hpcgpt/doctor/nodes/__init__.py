"""The health check of compute nodes: a job that measures each node alone, then in pairs, and names the bad ones."""

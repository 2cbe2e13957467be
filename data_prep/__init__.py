"""Text in, token shards out. Start reading at ``data_prep/make_shards.py``."""

"""Turn text into token shards. Start reading at ``data_prep/make_shards.py``."""

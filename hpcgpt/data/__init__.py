"""Token shards and the order of samples: the format, reading, writing, and the batches of each rank."""

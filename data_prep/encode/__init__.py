"""Documents to ids: finding the tokenizer, and fast encoders that were compared with it."""

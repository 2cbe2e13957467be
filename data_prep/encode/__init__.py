"""Documents to ids: which tokenizer is meant, and fast encoders that are proved to give its ids."""

"""Documents to ids: fast encoders that were compared with the tokenizer."""

"""Other ways to tokenise a corpus, each a program: ``python -m peers.NAME INPUT OUT TOKENIZER WORKERS``.

INPUT is a jsonl file, OUT a folder that is there and empty, TOKENIZER a folder with ``vocab.tiktoken`` and
``tokenizer.json`` (see hpcgpt.tokenizer.save_load) and ``huggingface.json``. Written anew, from descriptions of what
these programs do; where one leaves a choice, it is made in favour of speed: orjson reads the lines, and tiktoken
encodes.
"""

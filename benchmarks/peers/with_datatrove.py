"""datatrove: its JsonlReader and DocumentTokenizer, in its LocalPipelineExecutor.

A task reads whole files, so INPUT is a folder with a file for each worker. Runs in an environment of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(source: str, out: str, tokenizer: str, workers: str) -> None:
    steps = [
        JsonlReader(source),
        DocumentTokenizer(
            output_folder=out,
            tokenizer_name_or_path=str(Path(tokenizer) / "huggingface.json"),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
        ),
    ]
    count = int(workers)
    LocalPipelineExecutor(pipeline=steps, tasks=count, workers=count, logging_dir=f"{out}/logs").run()


if __name__ == "__main__":
    main(*sys.argv[1:5])

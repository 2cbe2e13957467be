"""``hpcgpt import PATH --out OUT``: make a run folder of weights from Hugging Face, nanoGPT or the course.

PATH is a folder with config.json, model.safetensors and tokenizer.json, as Hugging Face has them; nanoGPT's ckpt.pt; or
the course's model_%06d.pth. Nothing is downloaded, and nothing in these files is executed.

No torch in here, so that --help is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.output import streams

ABOUT = (
    "Make a run folder of released weights: GPT-2, Llama, Qwen2 or Qwen3 as Hugging Face has them, nanoGPT's ckpt.pt, "
    "or the course's model_%06d.pth. It can be sampled, evaluated and exported, and `hpcgpt train OUT/config.toml` "
    "trains on from it in a new run."
)


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    # Imported here, since it loads torch.
    from hpcgpt.import_weights import importing

    for line in importing.run(options):
        print(line, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcgpt import", description=ABOUT)
    parser.add_argument("PATH", help="folder with config.json, or a file that torch.save wrote")
    parser.add_argument("--out", required=True, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--tokenizer", type=paths.not_empty, metavar="NAME|FOLDER",
        help="the tokenizer of the weights, if PATH has no tokenizer.json: as for make_shards, for example gpt2",
    )  # fmt: skip
    parser.add_argument(
        "--end-of-text", default="", metavar="TOKEN", help="the special token between documents, if it is not the usual"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=0, metavar="N",
        help="cut the vocabulary to N ids, or add ids with the mean embedding (default: as it is)",
    )  # fmt: skip
    parser.add_argument(
        "--block-size", type=int, default=0, metavar="N", help="another context length (default: the largest there is)"
    )
    parser.add_argument("--heads", type=int, default=0, metavar="N", help="model_%%06d.pth: attention heads of a block")
    parser.add_argument(
        "--gelu", choices=("tanh", "exact"), default="", help="files of torch.save: the form of GELU, if it is another"
    )
    parser.add_argument(
        "--no-check", action="store_true",
        help="do not compare logits with those that transformers computes (it never is, where that is not installed)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.run(main)

"""Run a command: ``hpcgpt NAME ...`` is ``python -m hpcgpt.NAME ...``, with _ for a - in the name."""

from __future__ import annotations

import importlib
import sys

from hpcgpt import cli
from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import USER_MISTAKE
from hpcgpt.output import terminal

COMMANDS = {
    "train": "pretrain a model, or resume a run",
    "submit": "queue a training job on Slurm",
    "estimate": "estimate memory, time and disk of a run, without a GPU",
    "slurm-script": "print a batch script, for sbatch without a checkout",
    "site": "show what hpcgpt has on known clusters, and compare it with this one",
    "status": "show how runs are going",
    "report": "show runs on one HTML page, to read, mail or print",
    "checkpoint": "list, verify and show a run's checkpoints",
    "sample": "generate text from a run's checkpoint",
    "eval": "compute a checkpoint's loss on the validation split, or its answers to tasks",
    "lm-eval": "run lm-evaluation-harness on a run's checkpoint",
    "import": "make a run folder of weights from Hugging Face or nanoGPT",
    "export": "write a run's weights for Hugging Face, nanoGPT or llm.c",
    "tracking": "send what Weights & Biases lacks of a run; make its dashboard",
    "doctor": "check this machine, the nodes of a cluster or its Slurm, before a run finds out",
    "drill": "inject faults into training runs, and compare the results byte for byte",
}
# Names of these commands in other programs, or that a person might try.
ALIASES = {
    "run": "train", "resume": "train", "pretrain": "train", "sbatch": "submit", "queue": "submit", "list": "status",
    "show": "status", "ps": "status", "ls": "checkpoint ls", "checkpoints": "checkpoint ls", "verify":
    "checkpoint verify", "generate": "sample", "evaluate": "eval", "val": "eval", "test": "drill",
    "plan": "estimate", "memory": "estimate", "sites": "site list", "script": "slurm-script",
    "convert": "export", "to-hf": "export", "batch-script": "slurm-script", "html": "report", "plot": "report",
    "check": "doctor", "health": "doctor", "preflight": "doctor",
}  # fmt: skip
# Packages of another name than the command: `import` is a keyword.
RENAMED = {"import": "import_weights", "lm-eval": "lm_eval"}
PACKAGES = ("checkpoint", "doctor", "drill", "estimate", "export", "import_weights", "lm_eval", "report", "status",
            "tracking")  # fmt: skip
DATA_PREP_COMMANDS = ("make_shards", "verify", "inspect", "export", "import_shards", "train_tokenizer")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:12} {about}" for name, about in COMMANDS.items())
        print(f"usage: hpcgpt COMMAND [...]\n\n{rows}\n\n`hpcgpt COMMAND --help` shows its options.")
        return
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        message = f"no command '{terminal.printable(name)}'; there are {', '.join(COMMANDS)}{_suggestion(name)}"
        sys.exit(cli.print_error(UserError(message), USER_MISTAKE))
    name = RENAMED.get(name, name)
    module = f"hpcgpt.{name}.__main__" if name in PACKAGES else f"hpcgpt.{name.replace('-', '_')}"
    command = importlib.import_module(module)
    cli.run(command.main, getattr(command, "leave", sys.exit))


def _suggestion(name: str) -> str:
    if name in ALIASES:
        return f" (did you mean {ALIASES[name]}?)"
    if name.replace("-", "_") in DATA_PREP_COMMANDS:
        return f" (did you mean `python -m data_prep.{name.replace('-', '_')}`?)"
    return nearest(name, list(COMMANDS))


if __name__ == "__main__":
    main()

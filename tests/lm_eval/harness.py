"""The program of test_agreement, where lm-eval is installed: ``-m tests.lm_eval.harness FOLDER RUN EXPORT RUN EXPORT``.

Evaluates a run through the adapter, and its export through lm-eval's own hf model, on the tasks of FOLDER; a second run
and its export, whose model is a modern one, on one of them. Writes the results into FOLDER/results.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from hpcgpt.lm_eval import __main__ as command


def evaluated(folder: Path, model: str, arguments: str, pattern: str = "*") -> dict[str, Any]:
    """Return the results of the tasks in FOLDER that `pattern` names, and what the model answered to each request."""
    names = sorted(path.stem for path in folder.glob(f"{pattern}.yaml"))
    # Without any bootstrap samples it would compute no standard errors at all.
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, device="cpu", batch_size=16, bootstrap_iters=10,
        task_manager=TaskManager(include_path=str(folder)),
    )  # fmt: skip
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return {"results": found["results"], "answers": answers}


def main(folder: Path, run: str, export: str, modern_run: str, modern_export: str) -> None:
    # The command line, as a user types it. It registers the model for what follows.
    flags = ["--include_path", str(folder), "--tasks", "made_endings", "--batch_size", "16", "--output_path"]
    command.main(["run", "--model", "hpcgpt", "--model_args", f"run={run}", *flags, str(folder / "command")])
    ours, of_export = evaluated(folder, "hpcgpt", f"run={run}"), evaluated(folder, "hf", f"pretrained={export}")
    modern = evaluated(folder, "hpcgpt", f"run={modern_run}", "made_arc")
    of_modern_export = evaluated(folder, "hf", f"pretrained={modern_export}", "made_arc")
    results = {"ours": ours, "export": of_export, "modern_ours": modern, "modern_export": of_modern_export}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

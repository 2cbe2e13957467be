"""Measure exports of GPT-2 (124M and deeper, random weights): time and memory of writing and of the check.

    python benchmarks/export.py FOLDER [--layers 12 36] [--json FILE]

FOLDER gets run folders and exports, and is not removed. Each export runs in a process of its own. Its anonymous memory
(RssAnon: what it has allocated, without code and mapped files) is read every 5 ms: `before_mb` with torch loaded, and
the peaks while it compares checksums, writes, and checks.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERY_S = 0.005
EXPORTS = (("hf", "float32"), ("hf", "bfloat16"), ("nanogpt", "float32"), ("llmc", "bfloat16"))


def main() -> None:
    options = _parser().parse_args()
    folder = Path(options.FOLDER).absolute()
    if options.one:
        to, dtype = options.one
        print(json.dumps(_export(folder, to, dtype)))
        return
    import machine

    rows = []
    for layers in options.layers:
        run = folder / f"gpt2-{layers}"
        if not run.exists():
            _make(run, layers)
        for to, dtype in EXPORTS if layers == options.layers[0] else EXPORTS[:1]:
            words = [sys.executable, __file__, str(run), "--one", to, dtype]
            done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
            rows.append({"layers": layers, "to": to, "dtype": dtype} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine.about(), "runs": rows}, indent=1) + "\n")


def _make(run: Path, layers: int) -> None:
    """Make a run folder with a checkpoint of random weights."""
    from hpcgpt.checkpoint import layout, safetensors_writer
    from hpcgpt.checkpoint.layout import State
    from hpcgpt.config import sources
    from hpcgpt.config.options import Config, Data, Model, Run
    from hpcgpt.model.gpt import GPT
    from hpcgpt.tokenizer import find_tokenizer, save_load

    config = Config(
        run=Run(name=run.name, dir=str(run.parent)),
        model=Model(n_layer=layers, vocab_size=50257),
        data=Data(dir="none"),
    )
    checkpoint = layout.path_of(run / "checkpoints", 1)
    checkpoint.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"id": "benchmark", "created": 0.0}))
    (run / "config.toml").write_text(sources.to_toml(config))
    save_load.save(find_tokenizer.gpt2(), run / "tokenizer")
    state, name = layout.state_bytes(State(1, 1, 1, 1, {})), layout.share_name(0, 1)
    (checkpoint / "state.json").write_bytes(state)
    tensors = {f"model/{name}": parameter.detach() for name, parameter in GPT(config.model).named_parameters()}
    files = {
        "state.json": safetensors_writer.fingerprint(state),
        name: safetensors_writer.write(checkpoint / name, tensors),
    }
    (checkpoint / "manifest.json").write_bytes(layout.manifest_bytes(files, 1))


def _export(run: Path, to: str, dtype: str) -> dict[str, Any]:
    """Export in this process; return seconds and MB."""
    sys.path.insert(0, str(ROOT))
    from hpcgpt.checkpoint import run_config
    from hpcgpt.export import exporting
    from hpcgpt.export import source as sources

    target, out = exporting.TARGETS[to], run.with_name(f"{run.name}-{to}-{dtype}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    target.reader()
    found: dict[str, Any] = {"before_mb": _anonymous_mb()}
    with _measured("verify", found):
        source = exporting.open_source(run, run_config.config(run), None, False, dtype)
    with _measured("write", found):
        target.write(source, out)
    with _measured("check", found):
        probe = sources.probe(source)
        found["difference"] = target.check(source, out, probe).difference
    return found | {"tokens": probe.ids.numel(), "written_mb": exporting.size_mb(out)}


@contextmanager
def _measured(name: str, found: dict[str, Any]) -> Iterator[None]:
    """Add the seconds and the peak of the memory of the block."""
    peak, ended = [_anonymous_mb()], threading.Event()

    def sample() -> None:
        while not ended.wait(EVERY_S):
            peak[0] = max(peak[0], _anonymous_mb())

    thread = threading.Thread(target=sample)
    started_at = time.monotonic()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    found |= {f"{name}_s": round(time.monotonic() - started_at, 2), f"{name}_mb": max(peak[0], _anonymous_mb())}


def _anonymous_mb() -> float:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return round(int(match[1]) / 1000, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure exports of GPT-2.")
    parser.add_argument("FOLDER")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 36])
    parser.add_argument("--one", nargs=2, metavar=("TO", "DTYPE"), help="export the run in FOLDER, in this process")
    parser.add_argument("--json", help="file for the results")
    return parser


if __name__ == "__main__":
    main()

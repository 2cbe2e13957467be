"""Measure the model's options: memory of a step, speed of generation, torch.compile.

    python benchmarks/model.py [memory] [generation] [compile] [--device cpu|cuda] [--json FILE]

All three by default. The model is GPT-2 small's size, of both kinds; the modern one with 4 key-value heads.

    memory      forward and backward pass of 4 x 512 tokens, each option in a process of its own: the peak above the
                memory of the model itself (on a CPU the resident set, on a GPU torch's count)
    generation  tokens a second after a prompt of 32, greedy, with the cache and with a whole pass for each token
    compile     the same step with torch.compile, as one graph, and without: the differences of loss and gradients,
                and seconds a step. Two layers; with all options, and with none

Times are CPU seconds of this process on a CPU, so that other processes do not count, and wall-clock time on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch

from hpcgpt.config.operation import Sample
from hpcgpt.config.options import Model
from hpcgpt.model.generate import generate
from hpcgpt.model.gpt import GPT, PLAIN, ForwardOptions

KINDS = {"gpt2": Model(vocab_size=50257), "modern": Model(kind="modern", vocab_size=50257, n_kv_head=4)}
WAYS = {
    "plain": PLAIN,
    "loss_chunk 256": ForwardOptions(loss_chunk=256),
    "activation checkpointing": ForwardOptions(recompute=True),
    "both": ForwardOptions(loss_chunk=256, recompute=True),
    "document mask": ForwardOptions(document_start=0),
}
EVERYTHING = ForwardOptions(document_start=0, loss_chunk=256, z_loss=1e-4, recompute=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="memory, generation, compile (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        kind, way = options.alone
        print(_peak_bytes(kind, way, torch.device(options.device)))
        return
    device = torch.device(options.device)
    parts: dict[str, Callable[[torch.device], list[dict[str, Any]]]] = {
        "memory": _memory, "generation": _generation, "compile": _compile,
    }  # fmt: skip
    report: dict[str, Any] = {"device": str(device), "machine": machine.about()}
    for name in options.parts or parts:
        report[name] = parts[name](device)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _memory(device: torch.device) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for way in WAYS:
            words = [sys.executable, __file__, "--alone", kind, way, "--device", str(device)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            rows.append({"kind": kind, "way": way, "peak_bytes": int(done.stdout)})
            print(f"memory      {kind:7} {way:25} {rows[-1]['peak_bytes'] / 1e6:8,.0f} MB", flush=True)
    return rows


def _peak_bytes(kind: str, way: str, device: torch.device) -> int:
    model, x, y = _prepared(KINDS[kind], WAYS[way], device)
    for parameter in model.parameters():  # there are gradients anyhow
        parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        model(x, y).backward()
        return torch.cuda.max_memory_allocated(device) - before
    # After this, torch's threads have their memory, and memory that torch has freed does not count as new.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(x, y).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _prepared(shape: Model, options: ForwardOptions, device: torch.device) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """Make a model, and inputs and targets (4, 512) in which a document begins about every 50 tokens."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50257, (4, 513))
    ids[torch.rand(ids.shape) < 1 / 50] = 0
    ids = ids.to(device)
    return GPT(shape, 1, options).to(device), ids[:, :-1], ids[:, 1:]


def _generation(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for kind, shape in KINDS.items():
        model, x, _ = _prepared(shape, PLAIN, device)
        prompt = x[0, :32].tolist()
        for name, tokens, texts in (("cache", 64, generate), ("whole passes", 16, _uncached)):
            text = texts(model, prompt, Sample(tokens=tokens, temperature=0.0), device, 0)
            next(iter(text))
            started_at = _now(device)
            count = sum(1 for _ in text)
            rows.append({"kind": kind, "way": name, "tokens_per_s": count / (_now(device) - started_at)})
            print(f"generation  {kind:7} {name:25} {rows[-1]['tokens_per_s']:8.1f} tokens/s", flush=True)
    return rows


@torch.no_grad()
def _uncached(model: GPT, prompt: list[int], config: Sample, device: torch.device, _: int) -> Any:
    ids = list(prompt)
    model.eval()
    for _ in range(config.tokens):
        ids.append(int(model(torch.tensor([ids], device=device))[0, -1].argmax()))
        yield ids[-1]


def _compile(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for kind, shape in KINDS.items():
        for name, options in (("plain", PLAIN), ("all options", EVERYTHING)):
            model, x, y = _prepared(Model(**vars(shape) | {"n_layer": 2}), options, device)
            compiled = torch.compile(model, fullgraph=True)
            expected, plain_s = _step(model, x, y, device)
            gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
            began_at = time.perf_counter()
            _step(compiled, x, y, device, 1)
            compile_s = time.perf_counter() - began_at
            loss, compiled_s = _step(compiled, x, y, device)
            apart = max(
                float((parameter.grad - gradient).abs().max())
                for parameter, gradient in zip(model.parameters(), gradients, strict=True)
                if parameter.grad is not None
            )
            rows.append({"kind": kind, "way": name, "plain_s": plain_s, "compiled_s": compiled_s})
            rows[-1] |= {"compile_s": compile_s, "loss_apart": abs(loss - expected), "gradients_apart": apart}
            print(f"compile     {kind:7} {name:25} {plain_s:8.3f} s a step, compiled {compiled_s:.3f} s")
            print(
                f"{'':46} {compile_s:.0f} s to compile; apart by {abs(loss - expected):.0e} and {apart:.0e}", flush=True
            )
    return rows


def _step(module: Any, x: torch.Tensor, y: torch.Tensor, device: torch.device, times: int = 3) -> tuple[float, float]:
    """Run steps; return the loss and the median of the seconds."""
    seconds = []
    for _ in range(times):
        module.zero_grad()
        started_at = _now(device)
        loss = module(x, y)
        loss.backward()
        seconds.append(_now(device) - started_at)
    return float(loss), statistics.median(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()

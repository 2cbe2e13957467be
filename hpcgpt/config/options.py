"""The options of a run: frozen dataclasses, one for each section, and `Config` with all of them.

Those that do not change what a run computes are in ``hpcgpt/config/operation.py``.

Where their values come from (a TOML file or preset, then flags) is in ``hpcgpt/config/sources.py``; which values
contradict each other, in ``hpcgpt/config/contradictions.py``. The defaults are those of GPT-2 small (124M).

No torch in here: a login node reads configurations too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hpcgpt.config import paths
from hpcgpt.config.operation import Blame, Doctor, Profile, Requeue, Sample, Tracking, Watchdog
from hpcgpt.config.option import option

# The hidden width of the modern block's MLP is a multiple of this by default, for efficient matrix products.
WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class Run:
    name: str = option("gpt2", "name of the run; its folder is <dir>/<name>")
    dir: str = option("runs", "folder that holds the run folders, on a file system that all nodes see", path=True)
    seed: int = option(1, "seed of weights, sample order and dropout", low=0, below=2**63)
    init_from: str = option(
        "", "folder or name of another run, whose newest weights are the initial ones; empty: random weights", path=True
    )
    init_step: int = option(0, "init_from: take the checkpoint of this step; 0: the newest", low=0)
    init_optimizer: bool = option(False, "init_from: also take the state of the optimizer; else it begins anew")
    init_data: Literal["start", "continue"] = option(
        "start", "init_from: begin with the first samples, or continue after those that the other run has trained on"
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: the GPUs that Slurm allocated or that are visible, else the CPU"
    )
    backend: Literal["auto", "gloo", "nccl"] = option("auto", "collectives; auto: nccl on GPUs, gloo on CPUs")
    rendezvous_timeout_s: float = option(60.0, "how long ranks wait for each other at the start, in seconds", above=0)
    threads: int = option(0, "CPU threads of a rank; 0: the number of its cores", low=0)
    strict: bool = option(
        False, "refuse to resume if something has changed that affects the bytes of the result: see docs/training.md"
    )


@dataclass(frozen=True)
class Part:
    """One data set of a mix."""

    dir: str
    weight: float


@dataclass(frozen=True)
class Data:
    dir: str = option("data/shards", "folder of token shards, made by `python -m data_prep.make_shards`", path=True)
    mix: tuple[Part, ...] = option(
        (), "instead of dir: several folders and their weights, DIR:WEIGHT,... (in TOML a list of {dir, weight})"
    )
    tokenizer: str = option("", "name or fingerprint that the shards' tokenizer must have; empty: any")
    stride: int = option(0, "tokens between the starts of two windows; 0: block_size", low=0)
    verify_mb_per_s: float = option(
        50.0,
        "compare the shards' checksums with the manifest during training, reading at most this many MB a second on "
        "rank 0; 0: never",
        low=0,
    )
    document_mask: bool = option(
        False, "limit attention to each document, and restart positions there; else attention spans the whole window"
    )


@dataclass(frozen=True)
class Model:
    kind: Literal["gpt2", "modern"] = option(
        "gpt2", "architecture; modern: RMSNorm, rotary positions, SwiGLU, QK-norm, grouped queries, no biases (Qwen3's)"
    )
    n_layer: int = option(12, "transformer blocks", low=1)
    n_head: int = option(12, "attention heads of a block", low=1)
    n_kv_head: int = option(
        0, "modern: key-value heads of a block, each shared by as many query heads; 0: n_head", low=0
    )
    n_embd: int = option(768, "width of the residual stream", low=1)
    head_size: int = option(0, "modern: width of a head; 0: n_embd / n_head", low=0)
    mlp_width: int = option(
        0, "hidden width of a block's MLP; 0: 4 n_embd, or for modern 8/3 n_embd, rounded up to a multiple of 64", low=0
    )
    block_size: int = option(1024, "context length in tokens", low=1)
    vocab_size: int = option(0, "size of the vocabulary; 0: that of the shards' tokenizer", low=0)
    dropout: float = option(0.0, "dropout on embeddings, attention and residual branches", low=0, below=1)
    qkv_bias: bool = option(True, "biases in the query, key and value projections (default of modern: false)")
    qk_norm: bool = option(True, "modern: norms on queries and keys")
    norm_eps: float = option(0.0, "epsilon of the norms; 0: 1e-5 for gpt2, 1e-6 for modern", low=0, below=1)
    gelu: Literal["tanh", "exact"] = option("tanh", "gpt2: GELU in its tanh form, as OpenAI's, or exact, as nanoGPT's")
    rope_base: float = option(10_000.0, "modern: base of the rotary angles", above=1)
    rope_factor: float = option(
        1.0, "modern: slow down rotary pairs with long periods by this factor, as Llama 3.1 does; 1: none", low=1
    )
    rope_low: float = option(
        1.0, "rope_factor: slow down pairs that turn fewer times than this within rope_context entirely", above=0
    )
    rope_high: float = option(
        4.0, "rope_factor: leave pairs that turn more often than this within rope_context as they are", above=0
    )
    rope_context: int = option(8192, "rope_factor: context length before it was extended, in tokens", low=1)
    tied: bool = option(True, "share the token embedding with the output head")
    init_std: float = option(0.02, "standard deviation of the initial weights; narrow models need more", above=0)

    @property
    def head_width(self) -> int:
        """Return D, the width of a head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Return K, the number of key-value heads of a block."""
        return self.n_kv_head or self.n_head

    @property
    def hidden_width(self) -> int:
        """Return F, the hidden width of a block's MLP."""
        if self.mlp_width:
            return self.mlp_width
        if self.kind == "gpt2":
            return 4 * self.n_embd
        # Three matrices of width 8/3 C have as many weights as GPT-2's two of width 4 C.
        return math.ceil(8 * self.n_embd / 3 / WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    @property
    def epsilon(self) -> float:
        """Return the epsilon of the norms: of GPT-2's LayerNorm, or of Qwen3's RMSNorm, unless it was set."""
        return self.norm_eps or (1e-5 if self.kind == "gpt2" else 1e-6)


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "muon"] = option(
        "adamw", "optimizer; muon: Muon for the blocks' matrices, AdamW for the other parameters"
    )
    lr: float = option(6e-4, "peak learning rate", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", low=0)
    decay: Literal["matrices", "all"] = option("matrices", "which parameters decay: matrices only, or all")
    beta1: float = option(0.9, "AdamW's first beta", low=0, below=1)
    beta2: float = option(0.95, "AdamW's second beta", low=0, below=1)
    muon_lr: float = option(
        0.02, "muon: peak learning rate of the matrices, with the same schedule as optim.lr", above=0
    )
    muon_momentum: float = option(0.95, "muon: momentum", low=0, below=1)
    clip_norm: float = option(1.0, "clip the averaged gradient to this norm on every step; 0: do not clip", low=0)
    z_loss: float = option(0.0, "add this times the mean square of the logits' log-sum-exp to the training loss", low=0)


@dataclass(frozen=True)
class Schedule:
    kind: Literal["cosine", "linear", "wsd", "constant"] = option("cosine", "shape of the learning rate after warm-up")
    warmup_steps: int = option(700, "steps of linear warm-up from initial_lr to optim.lr", low=0)
    initial_lr: float = option(0.0, "learning rate of the first step", low=0)
    min_lr: float = option(6e-5, "learning rate at the end of the decay", low=0)
    decay_fraction: float = option(0.2, "wsd: fraction of all steps in which the rate decays at the end", low=0, high=1)


@dataclass(frozen=True)
class Train:
    steps: int = option(0, "length of the run in optimizer steps (give one of steps, tokens, epochs)", low=0)
    tokens: int = option(10_000_000_000, "length of the run in target tokens, rounded up to steps", low=0)
    epochs: float = option(0.0, "length of the run in passes over the training split", low=0)
    global_batch: int = option(512, "sequences in an optimizer step, over all ranks", low=1)
    micro_batch: int = option(16, "sequences in a forward pass on one rank", low=1)
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "auto", "precision of the forward pass; auto: bfloat16 where the hardware has it, else float32"
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "run the model through torch.compile; auto: on a GPU, if torch.compile's requirements are installed"
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "math", "fa3"] = option(
        "auto", "attention kernel; auto: torch chooses"
    )
    deterministic: bool = option(False, "kernels that add in the same order each time, on GPUs and compiled; slower")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "after a loss or gradient that is not finite: stop the run, or skip that step, for which each step has to wait "
        "for its result",
    )
    loss_chunk: int = option(
        0,
        "compute the loss in chunks of this many tokens, so that only one chunk's logits are in memory; 0: all at once",
        low=0,
    )
    activation_checkpointing: bool = option(
        False, "keep only each block's input for the backward pass: less memory, a third more computation"
    )


@dataclass(frozen=True)
class Parallel:
    mode: Literal["ddp", "zero1", "zero2", "fsdp"] = option(
        "ddp",
        "ddp: every rank holds everything; zero1: shards the optimizer's state, and the weights between steps; zero2: "
        "also gradients, sent for each micro-batch; fsdp: also the weights within a step, gathered twice for each",
    )
    gradient_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "dtype in which gradients are reduced between ranks; bfloat16: half the bytes, rounded before the sum",
    )
    shard_within: str = option("all", "but for ddp: ranks that share a copy of the weights: all, node, or a number")


@dataclass(frozen=True)
class Spike:
    factor: float = option(
        0.0,
        "after a loss above this many times the usual one, go back to the last regular checkpoint and skip the samples "
        "since; 0: never",
        low=0,
    )
    window: int = option(100, "number of steps whose median loss is the usual one", low=2, high=1000)
    max_rollbacks: int = option(3, "rollbacks after which the run ends", low=1)


@dataclass(frozen=True)
class Checkpoint:
    every: int = option(500, "steps between two checkpoints; 0: save only at the end and when the run stops", low=0)
    keep_last: int = option(3, "how many of the newest valid checkpoints to keep", low=1)
    keep_every: int = option(0, "also keep the checkpoints of steps that are a multiple of this; 0: none", low=0)
    keep_best: bool = option(True, "also keep the checkpoint with the best validation loss")
    background: bool = option(True, "write checkpoints while training continues")
    files: int = option(
        64, "the most files for the tensors of a checkpoint; where there are more ranks, several write into one", low=1
    )
    step: int = option(
        0, "go back to the checkpoint of this step, once; newer ones are kept aside; 0: continue from the newest", low=0
    )


@dataclass(frozen=True)
class Eval:
    every: int = option(250, "steps between two evaluations; 0: none", low=0)
    batches: int = option(
        20, "size of an evaluation, in batches of train.micro_batch sequences; 0: the whole split", low=0
    )
    train_batches: int = option(
        0, "also evaluate as many batches of the training split, as eval/train_loss; 0: none", low=0
    )
    tasks: tuple[str, ...] = option(
        (), "files of questions to evaluate on as well, FILE,... (in TOML a list); see docs/evaluation.md", path=True
    )
    tasks_every: int = option(
        0, "steps between two evaluations on eval.tasks, a multiple of eval.every; the last step has one, too", low=0
    )


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    spike: Spike = field(default_factory=Spike)
    profile: Profile = field(default_factory=Profile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    sample: Sample = field(default_factory=Sample)
    tracking: Tracking = field(default_factory=Tracking)
    requeue: Requeue = field(default_factory=Requeue)
    watchdog: Watchdog = field(default_factory=Watchdog)
    blame: Blame = field(default_factory=Blame)
    doctor: Doctor = field(default_factory=Doctor)

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def from_anywhere(self) -> Config:
        """Return the configuration with absolute paths, as a run stores it, so that it can be read in any folder."""
        run = replace(self.run, dir=paths.absolute(self.run.dir), init_from=paths.absolute(self.run.init_from))
        mix = tuple(Part(paths.absolute(part.dir), part.weight) for part in self.data.mix)
        data = replace(self.data, dir=paths.absolute(self.data.dir), mix=mix)
        tasks = tuple(paths.absolute(path) for path in self.eval.tasks)
        return replace(self, run=run, data=data, eval=replace(self.eval, tasks=tasks))

    @property
    def profiled_steps(self) -> range:
        """Return the steps to trace, counted from 1."""
        first, _, last = self.profile.steps.partition("-")
        return range(int(first), int(last or first) + 1) if first else range(0)

    @property
    def stride(self) -> int:
        """Return the number of tokens between the starts of two windows."""
        return self.data.stride or self.model.block_size


# Defaults of a kind of model that differ from those in Model.
KIND_DEFAULTS: dict[str, dict[str, Any]] = {"modern": {"qkv_bias": False}}

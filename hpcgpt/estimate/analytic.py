"""The memory of one rank, counted tensor by tensor from the settings: where torch cannot be loaded, or takes too long.

Coarser than steps on fake tensors (``hpcgpt.estimate.fake_step``): tests/estimate/test_fake_step.py says how far the
two are apart. Widths below are bytes of one token and layer.

C channels, V padded vocabulary, F hidden width, w bytes of a number in the forward pass (2 or 4).

No torch in here.
"""

from __future__ import annotations

import math

from hpcgpt.config.options import Config, Model
from hpcgpt.estimate.account import GPU_FRAMEWORK_BYTES, PARTS, Memory, Moment
from hpcgpt.estimate.request import Request

# As in hpcgpt.model.gpt, which loads torch; a test compares them.
VOCAB_MULTIPLE = 64
STATE = {"adamw": 2, "muon": 1}  # tensors of optimizer state for each matrix of a block
CPU_FRAMEWORK_BYTES = 400 << 20  # Python and torch, roughly: nothing can be measured without them


def measure(request: Request, reason: str) -> Memory:
    """Return the memory of rank 0. `reason`: why it is counted in this way."""
    config, ranks = request.config, request.ranks
    full = 8 if config.train.dtype == "float64" else 4
    width = 2 if config.train.dtype == "bfloat16" else full
    blocks, rest = block_parameters(config.model), table_parameters(config.model)
    every = config.model.n_layer * blocks + rest
    sharded = ranks > 1 and config.parallel.mode != "ddp"
    within = config.parallel.shard_within
    share = ranks if within == "all" else int(within)
    held = -(-every // share) if sharded else every
    parts = dict.fromkeys(PARTS, 0)
    parts["weights"] = full * held + _copies(config, blocks, rest, sharded, full, width)
    parts["gradients"] = full * (held if config.parallel.mode in ("zero2", "fsdp") else every)
    state = STATE[config.optim.name] * config.model.n_layer * blocks + 2 * rest
    parts["optimizer"] = full * (-(-state // share) if sharded else state)
    parts["activations"], parts["logits"] = _activations(config, full, width)
    parts["framework"] = CPU_FRAMEWORK_BYTES if request.on_cpu else GPU_FRAMEWORK_BYTES
    saved = full * (every + state)
    copied = -(-saved // ranks)
    moments = [Moment("step", parts)]
    if request.on_cpu and request.saves_while_training:
        moments.append(Moment("save", parts | {"other": copied}))
    # Weights are made in host memory; if they are sharded, tensor by tensor.
    made = 4 * (_largest_tensor(config.model) if sharded else every)
    host = moments[-1].total if request.on_cpu else CPU_FRAMEWORK_BYTES + max(made, copied)
    flops = flops_per_token(config.model)
    return Memory(tuple(moments), parameter_count(config.model), flops, saved, copied, host, "analytic", (reason,))


def block_parameters(model: Model) -> int:
    """Count the parameters of a block."""
    width, hidden = model.n_embd, model.hidden_width
    if model.kind == "gpt2":
        qkv = 3 * width * width + (3 * width if model.qkv_bias else 0)
        return 4 * width + qkv + width * width + width + 2 * hidden * width + hidden + width
    size = model.head_width
    qkv = (model.n_head + 2 * model.kv_heads) * size * (width + (1 if model.qkv_bias else 0))
    norms = 2 * width + (2 * size if model.qk_norm else 0)
    return norms + qkv + model.n_head * size * width + 3 * hidden * width


def table_parameters(model: Model) -> int:
    """Count the parameters outside of blocks, padding rows included."""
    tables = padded_vocabulary(model) * (1 if model.tied else 2)
    gpt2 = model.kind == "gpt2"
    return (tables + (model.block_size if gpt2 else 0)) * model.n_embd + model.n_embd * (2 if gpt2 else 1)


def _largest_tensor(model: Model) -> int:
    """Count the parameters of the largest one."""
    hidden = model.hidden_width * (1 if model.kind == "gpt2" else 2)
    return max(padded_vocabulary(model), hidden, 3 * model.n_embd) * model.n_embd


def parameter_count(model: Model) -> int:
    """Count the parameters, without padding rows and a tied head only once."""
    padding = (padded_vocabulary(model) - model.vocab_size) * (1 if model.tied else 2) * model.n_embd
    return model.n_layer * block_parameters(model) + table_parameters(model) - padding


def flops_per_token(model: Model) -> int:
    """Count the FLOPs of one token's forward and backward pass: see ``hpcgpt.model.gpt.GPT.flops_per_token``."""
    tables = model.block_size if model.kind == "gpt2" else 0
    tables += 0 if model.tied else model.vocab_size
    products = parameter_count(model) - tables * model.n_embd
    return 6 * products + 12 * model.n_layer * model.n_head * model.head_width * model.block_size


def padded_vocabulary(model: Model) -> int:
    return math.ceil(model.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _copies(config: Config, blocks: int, rest: int, sharded: bool, full: int, width: int) -> int:
    """Return the bytes of weights beside those that are kept between steps: gathered ones, and copies in bfloat16."""
    every = config.model.n_layer * blocks
    if not sharded:
        head = padded_vocabulary(config.model) * config.model.n_embd
        return (every + head) * width if width < full else 0
    return (blocks if config.parallel.mode == "fsdp" else every) * width + rest * full


def _activations(config: Config, full: int, width: int) -> tuple[int, int]:
    """Return the bytes of activations, and those of logits and their gradients.

    With loss chunks the gradient of the head is in memory as soon as the logits are: see hpcgpt.model.loss.
    """
    model, train = config.model, config.train
    tokens = train.micro_batch * model.block_size
    channels, hidden = model.n_embd, model.hidden_width
    queries, keys = model.n_head * model.head_width, 2 * model.kv_heads * model.head_width
    # Both norms' inputs in the residual stream and their results; queries, keys, values; attention's result.
    block = 2 * full * channels + width * (2 * channels + queries + keys + queries)
    if model.kind == "gpt2":
        block += width * 2 * hidden  # before and after GELU
    else:
        block += width * (4 * hidden + queries + keys // 2)  # gate, up, silu, product; rotated queries and keys
    layers = model.n_layer * block
    if train.activation_checkpointing:
        layers = model.n_layer * full * channels + block
    rows = min(tokens, train.loss_chunk or tokens)
    logits = rows * padded_vocabulary(model) * 3 * full
    if rows < tokens:
        logits += padded_vocabulary(model) * channels * full
    return tokens * (layers + 2 * full * channels), logits

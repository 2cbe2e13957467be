"""hpcgpt.distributed.eager_ddp: DDP's gradients, without loading torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hpcgpt.distributed import eager_ddp
from hpcgpt.exit_codes import FINISHED
from tests.programs import ROOT, clean_env

RANK = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from hpcgpt.distributed.eager_ddp import eager_ddp

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

def gradients(make):
    torch.manual_seed(4)
    model = make(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), gradient_as_bucket_view=True)
    torch.manual_seed(rank)
    for step in range(2):
        with model.no_sync():
            model(torch.randn(5, 8)).square().sum().backward()
        model(torch.randn(5, 8)).square().sum().backward()
    return b"".join(parameter.grad.numpy().tobytes() for parameter in model.parameters())

eager, loaded = gradients(eager_ddp), "torch._dynamo" in sys.modules
print(loaded, eager == gradients(DistributedDataParallel), "torch._dynamo" in sys.modules, hash(eager) != hash(b""))
dist.destroy_process_group()
"""


@pytest.mark.processes
def test_two_ranks_have_the_gradients_of_ddp_and_do_not_load_the_compiler(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting")], cwd=ROOT, env=clean_env(),
                         stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["False True True True\n"] * 2


@pytest.mark.processes
def test_a_run_of_two_ranks_does_not_load_the_compiler(tiny: Path) -> None:
    """By any of its parts; half of what its start would take."""
    variables = {"TORCHELASTIC_RUN_ID": tiny.parent.name, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-X", "importtime", "-m", "hpcgpt.train", str(tiny)]
    ranks, logs = [], [tiny.parent / f"{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        env = clean_env() | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=file))
    assert [rank.wait(200) for rank in ranks] == [FINISHED] * 2, logs[0].read_text()[-2000:]
    for log in logs:
        lines = log.read_text()
        assert "torch.nn.parallel.distributed" in lines
        assert "torch._dynamo" not in lines


def test_a_version_of_torch_that_asks_the_compiler_for_more_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module has another name here, since the tests have loaded the compiler."""
    asked: list[Any] = []

    def construct(module: nn.Module) -> nn.Module:
        asked.append(vars(torch).get("_asked"))
        if asked[-1] is not None:
            assert asked[-1].utils.get_optimize_ddp_mode() == "ddp_optimizer"
            asked[-1].utils.another_setting()
        return module

    monkeypatch.setattr(eager_ddp, "_NAME", "_asked")
    monkeypatch.setattr(eager_ddp, "EagerDDP", construct)
    module: Any = nn.Linear(2, 2)
    assert eager_ddp.eager_ddp(module) is module
    assert [type(each) for each in asked] == [SimpleNamespace, type(None)]
    assert "_asked" not in vars(torch)

"""hpcgpt.distributed.eager_ddp: DDP's gradients, without loading torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
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
    with ExitStack() as ends:
        ranks = []
        for rank in range(2):
            command = [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting")]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE, text=True))
            ends.callback(ranks[-1].kill)
        assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["False True True True\n"] * 2


@pytest.mark.processes
def test_a_run_of_two_ranks_does_not_load_the_compiler(tiny: Path) -> None:
    """By any of its parts; half of what its start would take."""
    variables = {"TORCHELASTIC_RUN_ID": tiny.parent.name, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-X", "importtime", "-m", "hpcgpt.train", str(tiny)]
    ranks, logs = [], [tiny.parent / f"{rank}.log" for rank in range(2)]
    with ExitStack() as ends:
        for rank, log in enumerate(logs):
            env = clean_env() | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=file))
            ends.callback(ranks[-1].kill)
        ended = [rank.wait(200) for rank in ranks]
    assert ended == [FINISHED] * 2, [log.read_text()[-1000:] for log in logs]
    for log in logs:
        lines = log.read_text()
        assert "torch.nn.parallel.distributed" in lines
        assert "torch._dynamo" not in lines


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in torch that takes the compiler's place, since the tests have loaded the compiler."""
    (tmp_path / "_asked.py").write_text("setting = 7\nclass utils:\n    other = 8\n")
    monkeypatch.setattr(torch, "__path__", [*torch.__path__, str(tmp_path)])
    monkeypatch.setattr(eager_ddp, "_NAME", "_asked")
    yield "_asked"
    vars(torch).pop("_asked", None)
    sys.modules.pop("torch._asked", None)


@pytest.mark.parametrize("asks", [lambda found: found.setting == 7, lambda found: found.utils.other == 8])
def test_a_version_of_torch_that_asks_the_compiler_for_more_loads_it(
    asks: Callable[[Any], bool], compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def construct(module: nn.Module) -> nn.Module:
        assert vars(torch)[compiler].utils.get_optimize_ddp_mode() == "ddp_optimizer"
        assert f"torch.{compiler}" not in sys.modules
        assert asks(vars(torch)[compiler])
        return module

    monkeypatch.setattr(eager_ddp, "EagerDDP", construct)
    module: Any = nn.Linear(2, 2)
    assert eager_ddp.eager_ddp(module) is module
    assert vars(torch)[compiler] is sys.modules[f"torch.{compiler}"]


def test_an_error_of_the_constructor_is_raised_and_it_is_not_called_again(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a collective: called again by one rank, it would meet other collectives of the other ranks."""
    calls = []

    def construct(module: nn.Module) -> nn.Module:
        calls.append(module)
        raise AttributeError("of the module")

    monkeypatch.setattr(eager_ddp, "EagerDDP", construct)
    with pytest.raises(AttributeError, match="of the module"):
        eager_ddp.eager_ddp(nn.Linear(2, 2))
    assert len(calls) == 1
    assert compiler not in vars(torch)

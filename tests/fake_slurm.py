"""A fake `scontrol` in a folder, a run that uses it, and the command that decides about the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.run import run_folder
from tests.programs import command


class FakeSlurm:
    """An scontrol that records its calls. tests/slurm/test_lab.py and its neighbours test the real one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.calls = folder / "scontrol.txt"
        self.answers()

    def away(self, times: int, then_requeued: bool = False) -> None:
        """Make the controller unreachable for this many calls; the last of them may have taken effect nevertheless."""
        script = self.folder / "scontrol"
        back = script.read_text().replace("#!/bin/sh\n", "", 1)
        requeued = back.replace("Restarts=0", "Restarts=1").replace("exit 0", "echo Job is completing >&2; exit 1")
        script.write_text(
            f"#!/bin/sh\nmode=$1\necho x >> {self.folder}/asked.$mode\n"
            f"if [ $(wc -l < {self.folder}/asked.$mode) -le {times} ]; then\n"
            '    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1\nfi\n'
            f"if {str(then_requeued).lower()} && [ -e {self.folder}/asked.requeue ]\n"
            f"then\n{requeued}\nelse\n{back}\nfi\n"
        )

    def answers(self, state: str = "RUNNING", restarts: int = 0, refuses: bool = False, **fields: str) -> None:
        more = {"Reason": "None", "PreemptTime": "None", "BatchFlag": "1"} | fields
        output = " ".join(f"{key}={value}" for key, value in more.items())
        script = self.folder / "scontrol"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {self.calls}\n'
            f'if [ "$1" = requeue ]; then {"echo Invalid >&2; exit 1" if refuses else "exit 0"}; fi\n'
            f"echo 'JobId=7 JobName=x JobState={state} {output} Requeue=1 Restarts={restarts}'\n"
        )
        script.chmod(0o755)

    def has_nodes(self, *nodes: str) -> None:
        """Set sinfo's answer: node and state."""
        (self.folder / "sinfo").write_text("#!/bin/sh\n" + "\n".join(f"echo {node}" for node in nodes) + "\n")
        (self.folder / "sinfo").chmod(0o755)

    @property
    def updates(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith("update")]

    @property
    def requeued(self) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line.removeprefix("requeue ") for line in lines if line.startswith("requeue")]


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def decided(slurm: FakeSlurm, run: Path, status: int, **env: str) -> tuple[int, str]:
    """Run `requeue decide` for the run in that folder; return exit status and messages."""
    job = {"SLURM_JOB_ID": "7", "PATH": f"{slurm.folder}:/usr/bin:/bin"} | env
    done = command("hpcgpt.requeue", "decide", "--status", str(status), "--run.dir", str(run.parent), "--run.name",
                   run.name, env=job)  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    run_folder.prepare(folder)
    return folder

"""slurm/pretrain.sbatch where it decides by itself, in bash: what needs no nodes, with an srun and a Slurm that play.

tests/slurm/test_batch_script_on_slurm.py has the same script on a real Slurm.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import submit
from tests.programs import ROOT, clean_env

SCRIPT = ROOT / "slurm" / "pretrain.sbatch"

# It keeps the job's fields in files, as slurmctld keeps them, and its commands in `calls`.
SQUEUE = """#!/bin/bash
cd "$STATE"
for word; do case $word in
    --format=%T) cat state ;; --format=%r) cat reason ;; --format=%k) cat comment ;; --format=%x) cat excluded ;;
    --format=%n) echo "(null)" ;; --format=%Z) cat workdir ;; --format=%e) echo 4000000000 ;;
    --Format=RestartCnt:12) cat restarts ;;
esac; done
"""
SCONTROL = """#!/bin/bash
cd "$STATE"
case $1 in
    requeue) echo "$@" >> calls; [ ! -e refuses ] || { echo "Requeue disabled" >&2; exit 1; } ;;
    update) echo "$@" >> calls; case $3 in
        Comment=*) [ ! -e no_comments ] || exit 1; echo "${3#Comment=}" > comment ;;
        ExcNodeList=*) echo "${3#ExcNodeList=}" > excluded ;; esac ;;
    show) [ ! -e no_hostnames ] || exit 1; [ "$2" != hostnames ] || tr , '\\n' <<< "$3" | grep . ;;
esac
"""
SINFO = '#!/bin/bash\ncat "$STATE/nodes"\n'
# srun's own flags come before `bash -c`; it ends as the test says, or as its command.
SRUN = """#!/bin/bash
if [[ " $* " == *" --overlap "* ]]; then cat "$STATE/can" 2>/dev/null; exit; fi
printf '%s\\n' "$@" > "$STATE/srun"
[ ! -e "$STATE/status" ] || exit "$(cat "$STATE/status")"
while [ "$1" != bash ]; do shift; done
exec "$@"
"""


class Batch:
    """One job's start. `python` is a folder on a mount that may be missing."""

    def __init__(self, tmp_path: Path) -> None:
        self.home, self.state = tmp_path, tmp_path / "state"
        self.bin, self.python = tmp_path / "bin", tmp_path / "mount" / "python"
        for folder in (self.state, self.bin, self.python.parent):
            folder.mkdir()
        for name, text in {"squeue": SQUEUE, "scontrol": SCONTROL, "sinfo": SINFO, "srun": SRUN}.items():
            self._program(self.bin / name, text)
        self.is_("state", "RUNNING").is_("reason", "None").is_("comment", "(null)").is_("excluded", "").is_(
            "restarts", "0"
        )
        self.is_("workdir", str(tmp_path)).is_("nodes", "n1\nn2\nn3")
        # What the ranks do; the rest is hpcgpt's own.
        self.has_python("case $2 in hpcgpt.train) exit 0 ;; esac")
        self.env = clean_env() | {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "STATE": str(self.state), "HPCGPT_PYTHON": str(self.python),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1",
            "SLURM_JOB_PARTITION": "low", "HPCGPT_PATIENCE_S": "60",
        }  # fmt: skip

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def is_(self, field: str, value: str) -> Batch:
        (self.state / field).write_text(f"{value}\n")
        return self

    def has_python(self, line: str) -> None:
        self._program(self.python, f'#!/bin/bash\n{line}\nexec {shlex.quote(sys.executable)} "$@"\n')

    def start(self, restarts: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        more = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        if restarts:
            self.is_("restarts", str(restarts))
        command = ["bash", str(SCRIPT), "--run.dir", str(self.home / "runs"), "--run.name", "mine"]
        return subprocess.run(
            command, env=self.env | more | env, cwd=self.home, capture_output=True, text=True, timeout=120, check=False
        )

    @property
    def calls(self) -> list[str]:
        path = self.state / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def has(self, field: str) -> str:
        return (self.state / field).read_text().strip()


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


# --- the start fails -----------------------------------------------------------------------------------


def test_a_first_start_without_python_is_a_persons_mistake(batch: Batch) -> None:
    batch.python.unlink()
    done = batch.start()
    assert done.returncode == 2
    assert f"{batch.python} cannot import hpcgpt" in done.stderr
    assert batch.calls == []


def test_a_restart_without_python_comes_back_on_another_node(batch: Batch) -> None:
    """The same command has worked before."""
    batch.python.unlink()
    done = batch.start(restarts=3)
    assert "requeue of job 7, 1 of 5 without hpcgpt.requeue" in done.stderr
    assert batch.calls == [
        "update JobId=7 Comment=hpcgpt_lost=1", "requeue 7", "update JobId=7 Comment=hpcgpt_lost=1 hpcgpt_avoid=n1",
        "update JobId=7 ExcNodeList=n1",
    ]  # fmt: skip


def test_the_first_start_of_a_chained_job_is_a_restart(batch: Batch) -> None:
    batch.python.unlink()
    batch.start(HPCGPT_CHAINED="1")
    assert "requeue 7" in batch.calls


def test_of_a_job_array_the_task_comes_back(batch: Batch) -> None:
    batch.python.unlink()
    batch.start(restarts=1, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert "requeue 5_2" in batch.calls


def test_it_comes_back_so_often_in_a_row_ever_later_and_then_stops(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("comment", "mine hpcgpt_x=3")
    for restarts in range(1, 6):
        batch.start(restarts)
    assert batch.has("comment") == "mine hpcgpt_x=3 hpcgpt_lost=5 hpcgpt_avoid=n1"
    assert [line.split("=")[-1] for line in batch.calls if "StartTime" in line] == [
        "now+2minutes", "now+10minutes", "now+30minutes", "now+60minutes"]  # fmt: skip
    done = batch.start(6)
    assert "no requeue of job 7: 5 starts in a row failed like this, the last one: " in done.stderr
    assert batch.calls.count("requeue 7") == 5


def test_where_the_comment_is_refused_a_job_that_was_restarted_often_is_left(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("no_comments", "")
    assert "requeue of job 7, 1 of 5" in batch.start(4).stderr
    assert "no requeue of job 7: 5 starts" in batch.start(5).stderr
    assert batch.calls.count("requeue 7") == 1


def test_what_it_left_out_itself_adds_up_and_a_persons_nodes_stay(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("excluded", "n9").is_("comment", "mine").is_("nodes", "n1\nn2\nn3\nn4")
    batch.start(1)
    assert (batch.has("excluded"), batch.has("comment")) == ("n9,n1", "mine hpcgpt_lost=1 hpcgpt_avoid=n1")
    batch.start(2, SLURMD_NODENAME="n2")
    assert (batch.has("excluded"), batch.has("comment")) == ("n9,n2,n1", "mine hpcgpt_lost=2 hpcgpt_avoid=n2,n1")


def test_of_too_few_nodes_the_one_that_failed_last_is_left_out_and_the_others_come_back(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("nodes", "n1\nn2\nn3")
    batch.start(1, SLURM_JOB_NUM_NODES="2")
    batch.start(2, SLURM_JOB_NUM_NODES="1", SLURMD_NODENAME="n1")
    assert batch.has("excluded") == "n1"
    batch.is_("nodes", "n1\nn2")
    batch.start(3, SLURMD_NODENAME="n2")
    assert (batch.has("excluded"), batch.has("comment")) == ("n2", "hpcgpt_lost=3 hpcgpt_avoid=n2")


def test_once_hpcgpt_requeue_has_decided_again_its_nodes_come_back(batch: Batch) -> None:
    """Where it runs in a container, without Slurm's tools; else it takes them over: see tests/test_requeue.py."""
    batch.has_python(
        'case $2.$3 in *.folder) echo "$STATE/run"; exit ;; *.decide) echo requeue; echo decided; exit ;; '
        "hpcgpt.train.*) exit 75 ;; esac"
    )
    (batch.state / "run" / "logs").mkdir(parents=True)
    batch.is_("excluded", "n9,n1").is_("comment", "hpcgpt_lost=1 hpcgpt_avoid=n1 mine")
    batch.start(2)
    assert "requeue 7" in batch.calls
    assert (batch.has("excluded"), batch.has("comment")) == ("n9", "mine")


def test_a_job_that_is_over_keeps_nothing_in_its_comment(batch: Batch) -> None:
    batch.is_("excluded", "n9,n1").is_("comment", "hpcgpt_lost=1 mine hpcgpt_avoid=n1")
    assert batch.start(1).returncode == 0
    assert batch.has("comment") == "mine"


def test_if_the_nodes_that_the_user_excluded_are_unknown_all_stay_excluded(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("excluded", "n[5-9]").is_("no_hostnames", "")
    batch.start(1)
    assert "requeue 7" in batch.calls
    assert batch.has("excluded") == "n[5-9]"


def test_where_slurm_names_no_nodes_it_excludes_what_it_did(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("nodes", "").is_("excluded", "n9,n2").is_("comment", "hpcgpt_avoid=n2")
    batch.start(1)
    assert batch.has("excluded") == "n9,n2"


def test_a_node_is_left_out_only_if_enough_are_left(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("nodes", "n1\nn2").is_("excluded", "n2")
    batch.start(1)
    assert batch.has("excluded") == "n2"
    assert "requeue 7" in batch.calls


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("echo 'ImportError: libtorch.so: cannot open shared object file: Input/output error' >&2; exit 1", "cannot"),
        ("kill -BUS $$", "cannot import hpcgpt"),
        ('[ "$2" != hpcgpt.requeue ] || exit 1', "could not be made ready: status 1"),
    ],
    ids=["EIO", "SIGBUS", "folder"],
)
def test_what_is_clearly_the_nodes_comes_back_from_the_first_start_too(batch: Batch, line: str, output: str) -> None:
    batch.has_python(line)
    assert output in batch.start().stderr
    assert "requeue 7" in batch.calls


def test_a_check_that_never_ends_is_ended(batch: Batch) -> None:
    """As on a mount whose server is gone."""
    never = batch.state / "never"
    os.mkfifo(never)
    batch.has_python(f"cat {never}")
    done = batch.start(HPCGPT_PATIENCE_S="1")
    assert "cannot import hpcgpt" in done.stderr
    assert "requeue 7" in batch.calls


def test_of_several_nodes_those_are_left_out_that_cannot_what_others_can(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("can", "<n2>").is_("nodes", "n1\nn2\nn3\nn4\nn5\nn6")
    done = batch.start(SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="n1,n2,n3")
    assert "requeue of job 7, 1 of 5" in done.stderr
    assert batch.has("excluded") == "n1,n3"


def test_what_none_of_several_nodes_can_is_a_mistake_at_first_and_no_single_nodes_fault_later(batch: Batch) -> None:
    batch.python.unlink()
    several: dict[str, Any] = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n1,n2,n3"}
    assert batch.start(**several).returncode == 2
    assert batch.calls == []
    batch.start(1, **several)
    assert "requeue 7" in batch.calls
    assert batch.has("excluded") == ""


def test_a_mistake_in_the_configuration_is_one_at_the_first_start_only(batch: Batch) -> None:
    """Later it is a configuration that this node cannot read."""
    batch.has_python('[ "$3" != folder ] || set -- "$@" --no.such 1')
    done = batch.start()
    assert done.returncode == 2
    assert "no.such" in done.stderr
    assert batch.calls == []
    batch.start(1)
    assert "requeue 7" in batch.calls


def test_a_job_that_slurm_is_ending_is_left(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("state", "COMPLETING")
    assert "no requeue of job 7, which is COMPLETING" in batch.start(1).stderr
    batch.is_("state", "RUNNING").is_("restarts", "2")
    batch.env["SLURM_RESTART_COUNT"] = "1"
    assert "Slurm has requeued it already" in batch.start().stderr
    assert batch.calls == []


def test_where_slurm_refuses_it_says_what_to_do(batch: Batch) -> None:
    batch.python.unlink()
    batch.is_("refuses", "")
    done = batch.start(1)
    assert "Slurm refused to requeue job 7 (Requeue disabled)" in done.stderr
    assert "Submit it again, it continues from the newest checkpoint" in done.stderr


def test_a_job_that_slurm_began_in_tmp_instead_of_its_folder_makes_no_run_there(batch: Batch) -> None:
    batch.is_("workdir", "/gone/away").is_("restarts", "1")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--run.dir", str(batch.home / "runs")], env=batch.env | {"SLURM_RESTART_COUNT": "1"},
        cwd="/tmp", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "cannot enter /gone/away" in done.stderr
    assert not (batch.home / "runs").exists()
    assert "requeue 7" in batch.calls


# --- the site file -------------------------------------------------------------------------------------


def test_a_site_file_may_use_variables_that_are_not_set_and_is_read_in_this_shell(batch: Batch) -> None:
    site = batch.home / "site.sh"
    site.write_text('export SEEN="$NOT_SET_AT_ALL:yes"\n')
    batch.has_python(f'echo "$SEEN" >> {batch.state}/seen; [ "$2" != hpcgpt.train ] || exit 0')
    done = batch.start(HPCGPT_SITE=str(site))
    assert done.returncode == 0, done.stderr
    assert set((batch.state / "seen").read_text().split()) == {":yes"}


def test_a_site_file_that_is_missing_is_a_mistake_at_first_and_the_nodes_fault_later(batch: Batch) -> None:
    assert batch.start(HPCGPT_SITE="/nowhere/site.sh").returncode == 2
    assert batch.calls == []
    assert "cannot read HPCGPT_SITE=/nowhere/site.sh" in batch.start(1, HPCGPT_SITE="/nowhere/site.sh").stderr
    assert "requeue 7" in batch.calls


# --- a job of hpcgpt.submit ------------------------------------------------------------------------------


def test_a_submitted_job_decides_where_the_checkout_is_gone_too(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = batch.home / "checkout.sbatch"
    checkout.write_bytes(SCRIPT.read_bytes())
    monkeypatch.setattr(submit, "SCRIPT", checkout)
    lines = submit.setup(["--run.dir", f"{batch.home}/my runs", "--run.name", "two  'words'"])
    job = batch.home / "job.sh"
    job.write_text("\n".join(["#!/bin/bash", *lines, "echo pickled"]))
    checkout.unlink()
    env = batch.env | {"SLURM_RESTART_COUNT": "1"}
    batch.is_("restarts", "1")
    done = subprocess.run(["bash", str(job)], env=env, cwd=batch.home, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (batch.home / "my runs" / "two  'words'" / "run.json").exists()
    batch.python.unlink()
    done = subprocess.run(["bash", str(job)], env=env, cwd=batch.home, capture_output=True, text=True, check=False)
    assert "requeue 7" in batch.calls
    assert "pickled" not in done.stdout


# --- srun has returned ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "again"), [(75, True), (1, True), (137, True), (127, True), (0, False), (2, False), (76, False)]
)
def test_where_python_is_gone_by_then_the_status_decides(batch: Batch, status: int, again: bool) -> None:
    batch.has_python('[ "$3" != decide ] || exit 127')
    batch.is_("status", str(status))
    done = batch.start()
    assert done.returncode == status
    assert "no decision: status 127" in done.stderr
    assert ("requeue 7" in batch.calls) == again


def test_a_stop_file_counts_here_too(batch: Batch) -> None:
    batch.has_python(f'if [ "$3" = decide ]; then touch {batch.home}/runs/mine/STOP; exit 1; fi')
    batch.is_("status", "75")
    assert "a STOP file keeps the run stopped" in batch.start().stderr
    assert batch.calls == []


def test_a_decision_not_to_requeue_is_one_though_slurm_refused_or_not(batch: Batch) -> None:
    batch.has_python('if [ "$3" = decide ]; then echo decided; exit 1; fi')
    batch.is_("status", "1").is_("comment", "mine hpcgpt_lost=4")
    batch.start(5)
    assert batch.calls == ["update JobId=7 Comment=mine"]  # the count is of starts in a row


def test_while_slurm_ends_the_job_at_its_time_limit_it_comes_back_without_python_too(batch: Batch) -> None:
    batch.has_python('[ "$3" != decide ] || exit 1')
    batch.is_("reason", "TimeLimit").is_("state", "COMPLETING")
    # Signal and end at one moment. The script is the parent of the shell that waits for srun.
    (batch.bin / "srun").write_text(
        '#!/bin/bash\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nkill -TERM "$script"\nexit 143\n'
    )
    done = batch.start()
    assert done.returncode == 143
    assert "requeue of job 7, 1 of 5 without hpcgpt.requeue" in done.stderr


def test_what_is_decided_while_srun_still_runs_is_decided_before_it_ends(batch: Batch) -> None:
    """As where the ranks hang, since a node is gone: srun waits for them, and both are killed."""
    batch.has_python(f'[ "$3" != decide ] || {{ echo "$5" >> {batch.state}/asked; exit 1; }}')
    batch.is_("reason", "TimeLimit").is_("state", "COMPLETING")
    (batch.bin / "srun").write_text(
        '#!/bin/bash\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nkill -TERM "$script"\n'
        'until [ -s "$STATE/calls" ]; do sleep 0.1; done\nexit 143\n'
    )
    batch.start()
    assert batch.has("asked").split() == ["ending", "143"]


def test_the_warning_that_was_asked_for_with_signal_b_reaches_srun_and_its_status_is_its_own(batch: Batch) -> None:
    """`wait` gave the signal's number instead."""
    (batch.bin / "srun").write_text(
        '#!/bin/bash\ntrap "exit 75" USR1\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nkill -USR1 "$script"\n'
        "while :; do sleep 0.1; done\n"
    )
    assert batch.start().returncode == 75


def without_slurm(batch: Batch) -> None:
    """HPCGPT_PYTHON is in a container: none of Slurm's tools is there."""
    batch.has_python("case $2 in hpcgpt.train) exit 0 ;; esac; PATH=/usr/bin/nowhere")


def test_slurms_tools_need_not_be_where_python_is(batch: Batch) -> None:
    """What hpcgpt.requeue has decided is done by the batch script, and is nothing to be counted."""
    without_slurm(batch)
    batch.is_("status", "75").is_("comment", "mine")
    done = batch.start()
    assert "requeue of job 7: saved, by the ranks' exit status" in done.stderr
    assert batch.calls == ["requeue 7"]
    events = (batch.home / "runs" / "mine" / "events.jsonl").read_text()
    assert '"event": "requeue"' in events
    assert "error" not in done.stderr


def test_nothing_comes_back_that_hpcgpt_requeue_leaves_or_slurm_is_ending(batch: Batch) -> None:
    without_slurm(batch)
    batch.is_("status", "0")
    batch.start()
    batch.is_("status", "75").is_("state", "COMPLETING")  # a person's scancel
    batch.start()
    assert batch.calls == []


# --- the ranks' signals --------------------------------------------------------------------------------

BLOCKED = sum(1 << (number - 1) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))


def rank_status(batch: Batch) -> dict[str, int]:
    """The signal masks of a rank's process before it installs a handler."""
    look = f'kill -TERM $$; grep -E "Sig(Blk|Pnd)|ShdPnd" /proc/$$/status > {batch.state}/masks; exit 0'
    batch.has_python(f'if [ "$2" = hpcgpt.train ]; then {look}; fi')
    done = batch.start()
    assert done.returncode == 0, done.stderr
    lines = (batch.state / "masks").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines}


def test_a_signal_waits_for_the_ranks_handlers(batch: Batch) -> None:
    masks = rank_status(batch)
    assert masks["SigBlk"] & BLOCKED == BLOCKED
    assert (masks["ShdPnd"] | masks["SigPnd"]) & 1 << (signal.SIGTERM - 1)


def test_where_env_cannot_block_signals_a_rank_ignores_them(batch: Batch) -> None:
    batch._program(batch.bin / "env", '#!/bin/bash\n[[ $1 != --block* ]] || exit 125\nexec /usr/bin/env "$@"\n')
    assert rank_status(batch)["SigBlk"] & BLOCKED == 0


def test_the_name_of_a_log_is_no_pattern(batch: Batch) -> None:
    subprocess.run(
        ["bash", str(SCRIPT), "--run.dir", f"{batch.home}/a%j%%b", "--run.name", "mine"], env=batch.env,
        cwd=batch.home, timeout=60, check=True, capture_output=True,
    )  # fmt: skip
    assert f"--output={batch.home}/a%%j%%%%b/mine/logs/7_0.log" in (batch.state / "srun").read_text().splitlines()

"""slurm/pretrain.sbatch: the decisions that it makes itself, in bash, with stand-ins for srun and Slurm's commands.

tests/slurm/test_batch_script_on_slurm.py tests the same script on a real Slurm.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.slurm import code_snapshot, submission
from tests.programs import ROOT, clean_env, run_group

pytestmark = pytest.mark.processes

SCRIPT = ROOT / "slurm" / "pretrain.sbatch"

# The stand-ins keep the job's fields in files, as slurmctld does in memory, and record their calls in `calls`.
SQUEUE = """#!/bin/bash
[ -z "$SQUEUE_PARTITION" ] || exit
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
# srun's own flags come before `bash -c`; it ends with the status that the test set, or runs its command.
SRUN = """#!/bin/bash
if [[ " $* " == *" --overlap "* ]]; then
    # As Slurm does: a mask of the ranks' cores, which a site exports, does not suit a step of one task.
    [[ ${SLURM_CPU_BIND:-} != mask_cpu:* || " $* " == *" --cpu-bind=none "* ]] || exit 1
    cat "$STATE/can" 2>/dev/null
    exit
fi
printf '%s\\n' "$@" > "$STATE/srun"
[ ! -e "$STATE/status" ] || exit "$(cat "$STATE/status")"
[ "${SRUN_EXPORT_ENV:-${SLURM_EXPORT_ENV:-ALL}}" != NONE ] || exec env -i "PATH=$PATH" "STATE=$STATE" "$0" "$@"
while [ "$1" != bash ]; do shift; done
exec "$@"
"""


class Batch:
    """One start of a job. `python` is in a folder on a mount that may be missing."""

    def __init__(self, tmp_path: Path) -> None:
        self.home, self.state = tmp_path, tmp_path / "state"
        self.bin, self.python = tmp_path / "bin", tmp_path / "mount" / "python"
        for folder in (self.state, self.bin, self.python.parent):
            folder.mkdir()
        for name, text in {"squeue": SQUEUE, "scontrol": SCONTROL, "sinfo": SINFO, "srun": SRUN}.items():
            self._program(self.bin / name, text)
        self.set_field("state", "RUNNING").set_field("reason", "None").set_field("comment", "(null)").set_field(
            "excluded", ""
        ).set_field("restarts", "0")
        self.set_field("workdir", str(tmp_path)).set_field("nodes", "n1\nn2\nn3")
        # The ranks end at once; everything else runs hpcgpt's own code.
        self.set_python("case $2 in hpcgpt.train) exit 0 ;; esac")
        self.env = clean_env() | {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "STATE": str(self.state), "HPCGPT_PYTHON": str(self.python),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1",
            "SLURM_JOB_PARTITION": "low", "HPCGPT_PATIENCE_S": "60",
        }  # fmt: skip

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def set_field(self, field: str, value: str) -> Batch:
        (self.state / field).write_text(f"{value}\n")
        return self

    def set_python(self, line: str) -> None:
        self._program(self.python, f'#!/bin/bash\n{line}\nexec {shlex.quote(sys.executable)} "$@"\n')

    def start(self, restarts: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        more = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        if restarts:
            self.set_field("restarts", str(restarts))
        command = ["bash", str(SCRIPT), "--run.dir", str(self.home / "runs"), "--run.name", "mine"]
        return run_group(command, self.env | more | env, self.home, timeout_s=120)

    @property
    def calls(self) -> list[str]:
        path = self.state / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def field(self, field: str) -> str:
        return (self.state / field).read_text().strip()


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def test_srun_gets_the_flags_of_a_container_and_starts_the_python_in_it(batch: Batch) -> None:
    """As for pyxis: the batch script's own Python is another one, outside."""
    (batch.bin / "python-inside").write_text('#!/bin/bash\necho "$@" > "$STATE/inside"\n')
    (batch.bin / "python-inside").chmod(0o755)
    done = batch.start(
        HPCGPT_SRUN_FLAGS=" --container-image=nvcr.io#a/b:1  --container-mounts=/x:/x",
        HPCGPT_RANKS_PYTHON="python-inside",
    )
    assert done.returncode == 0, done.stderr
    words = (batch.state / "srun").read_text().splitlines()
    assert words[3:6] == ["--container-image=nvcr.io#a/b:1", "--container-mounts=/x:/x", "bash"]
    assert batch.field("inside").startswith("-m hpcgpt.train --run.dir ")
    batch.start()
    assert (batch.state / "srun").read_text().splitlines()[3] == "bash"


@pytest.mark.parametrize("name", ["SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV"])
def test_the_ranks_of_a_job_of_export_none_get_what_the_script_exports(batch: Batch, name: str) -> None:
    """sbatch --export=NONE sets SLURM_EXPORT_ENV=NONE: without PYTHONPATH the ranks would import the live checkout."""
    batch.set_python('case $2 in hpcgpt.train) echo "$PYTHONPATH" > "$STATE/path"; exit 0 ;; esac')
    batch.env |= {"HPCGPT_CODE": str(ROOT), name: "NONE"}
    done = batch.start()
    assert done.returncode == 0, done.stderr
    assert batch.field("path") == str(ROOT)


# --- the start fails -----------------------------------------------------------------------------------


def test_a_first_start_without_python_is_a_user_error(batch: Batch) -> None:
    batch.python.unlink()
    done = batch.start()
    assert done.returncode == 2
    assert f"{batch.python} cannot import hpcgpt" in done.stderr
    assert batch.calls == []


def test_a_restart_without_python_is_requeued_to_another_node(batch: Batch) -> None:
    """A restart: the same command worked before, so the node is at fault."""
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


def test_a_task_of_a_job_array_is_requeued_alone(batch: Batch) -> None:
    batch.python.unlink()
    batch.start(restarts=1, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert "requeue 5_2" in batch.calls


def test_it_is_requeued_five_times_with_growing_delays_and_then_gives_up(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("comment", "mine hpcgpt_x=3")
    for restarts in range(1, 6):
        batch.start(restarts)
    assert batch.field("comment") == "mine hpcgpt_x=3 hpcgpt_lost=5 hpcgpt_avoid=n1"
    assert [line.split("=")[-1] for line in batch.calls if "StartTime" in line] == [
        "now+2minutes", "now+10minutes", "now+30minutes", "now+60minutes"]  # fmt: skip
    done = batch.start(6)
    assert "no requeue of job 7: 5 starts in a row failed like this, the last one: " in done.stderr
    assert batch.calls.count("requeue 7") == 5


def test_where_slurm_refuses_the_comment_the_restart_count_is_the_limit(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("no_comments", "")
    assert "requeue of job 7, 1 of 5" in batch.start(4).stderr
    assert "no requeue of job 7: 5 starts" in batch.start(5).stderr
    assert batch.calls.count("requeue 7") == 1


def test_excluded_nodes_add_up_and_the_users_stay_excluded(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("excluded", "n9").set_field("comment", "mine").set_field("nodes", "n1\nn2\nn3\nn4")
    batch.start(1)
    assert (batch.field("excluded"), batch.field("comment")) == ("n9,n1", "mine hpcgpt_lost=1 hpcgpt_avoid=n1")
    batch.start(2, SLURMD_NODENAME="n2")
    assert (batch.field("excluded"), batch.field("comment")) == ("n9,n2,n1", "mine hpcgpt_lost=2 hpcgpt_avoid=n2,n1")


def test_with_too_few_nodes_only_the_one_that_failed_last_is_excluded(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("nodes", "n1\nn2\nn3")
    batch.start(1, SLURM_JOB_NUM_NODES="2")
    batch.start(2, SLURM_JOB_NUM_NODES="1", SLURMD_NODENAME="n1")
    assert batch.field("excluded") == "n1"
    batch.set_field("nodes", "n1\nn2")
    batch.start(3, SLURMD_NODENAME="n2")
    assert (batch.field("excluded"), batch.field("comment")) == ("n2", "hpcgpt_lost=3 hpcgpt_avoid=n2")


def test_a_decision_of_hpcgpt_requeue_ends_the_exclusions_of_the_batch_script(batch: Batch) -> None:
    """Where hpcgpt.requeue runs in a container without Slurm's tools; else it adopts them: tests/test_requeue.py."""
    batch.set_python(
        'case $2.$3 in *.folder) echo "$STATE/run"; exit ;; *.decide) echo requeue; echo decided; exit ;; '
        "hpcgpt.train.*) exit 75 ;; esac"
    )
    (batch.state / "run" / "logs").mkdir(parents=True)
    batch.set_field("excluded", "n9,n1").set_field("comment", "hpcgpt_lost=1 hpcgpt_avoid=n1 mine")
    batch.start(2)
    assert "requeue 7" in batch.calls
    assert (batch.field("excluded"), batch.field("comment")) == ("n9", "mine")


def test_a_job_that_is_over_has_no_counters_in_its_comment(batch: Batch) -> None:
    batch.set_field("excluded", "n9,n1").set_field("comment", "hpcgpt_lost=1 mine hpcgpt_avoid=n1")
    assert batch.start(1).returncode == 0
    assert batch.field("comment") == "mine"


def test_if_the_users_excluded_nodes_are_unknown_all_stay_excluded(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("excluded", "n[5-9]").set_field("no_hostnames", "")
    batch.start(1)
    assert "requeue 7" in batch.calls
    assert batch.field("excluded") == "n[5-9]"


def test_where_slurm_lists_no_nodes_the_exclusions_stay_as_they_are(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("nodes", "").set_field("excluded", "n9,n2").set_field("comment", "hpcgpt_avoid=n2")
    batch.start(1)
    assert batch.field("excluded") == "n9,n2"


def test_a_node_is_excluded_only_if_enough_are_left(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("nodes", "n1\nn2").set_field("excluded", "n2")
    batch.start(1)
    assert batch.field("excluded") == "n2"
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
def test_a_failure_that_is_clearly_the_nodes_is_requeued_from_the_first_start_too(
    batch: Batch, line: str, output: str
) -> None:
    batch.set_python(line)
    assert output in batch.start().stderr
    assert "requeue 7" in batch.calls


def test_a_check_that_hangs_is_killed(batch: Batch) -> None:
    """As on a mount whose server is gone."""
    never = batch.state / "never"
    os.mkfifo(never)
    batch.set_python(f"cat {never}")
    done = batch.start(HPCGPT_PATIENCE_S="1")
    assert "cannot import hpcgpt" in done.stderr
    assert "requeue 7" in batch.calls


def test_of_several_nodes_those_without_python_are_excluded(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("can", "<n2>").set_field("nodes", "n1\nn2\nn3\nn4\nn5\nn6")
    done = batch.start(SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="n1,n2,n3")
    assert "requeue of job 7, 1 of 5" in done.stderr
    assert batch.field("excluded") == "n1,n3"


def test_masks_of_cores_that_a_site_exports_do_not_keep_the_other_nodes_from_being_checked(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("can", "<n2>").set_field("nodes", "n1\nn2\nn3\nn4\nn5\nn6")
    masks = "mask_cpu:0xfe,0xfe00"
    done = batch.start(SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="n1,n2,n3", SLURM_CPU_BIND=masks)
    assert "requeue of job 7, 1 of 5" in done.stderr
    assert batch.field("excluded") == "n1,n3"


def test_python_missing_on_all_nodes_is_a_user_error_at_first_and_excludes_none_later(batch: Batch) -> None:
    batch.python.unlink()
    several: dict[str, Any] = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n1,n2,n3"}
    assert batch.start(**several).returncode == 2
    assert batch.calls == []
    batch.start(1, **several)
    assert "requeue 7" in batch.calls
    assert batch.field("excluded") == ""


def test_a_wrong_configuration_is_a_user_error_at_the_first_start_only(batch: Batch) -> None:
    """At a restart it means that this node cannot read the configuration."""
    batch.set_python('[ "$3" != folder ] || set -- "$@" --no.such 1')
    done = batch.start()
    assert done.returncode == 2
    assert "no.such" in done.stderr
    assert batch.calls == []
    batch.start(1)
    assert "requeue 7" in batch.calls


def test_a_job_that_slurm_is_ending_or_has_requeued_is_left_alone(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("state", "COMPLETING")
    assert "no requeue of job 7, which is COMPLETING" in batch.start(1).stderr
    batch.set_field("state", "RUNNING").set_field("restarts", "2")
    batch.env["SLURM_RESTART_COUNT"] = "1"
    assert "Slurm has requeued it already" in batch.start().stderr
    assert batch.calls == []


def test_where_slurm_refuses_to_requeue_the_log_says_what_to_do(batch: Batch) -> None:
    batch.python.unlink()
    batch.set_field("refuses", "")
    done = batch.start(1)
    assert "Slurm refused to requeue job 7 (Requeue disabled)" in done.stderr
    assert "Submit it again, it continues from the newest checkpoint" in done.stderr


def test_a_job_that_slurm_started_in_tmp_instead_of_its_folder_makes_no_run_there(batch: Batch) -> None:
    batch.set_field("workdir", "/gone/away").set_field("restarts", "1")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--run.dir", str(batch.home / "runs")], env=batch.env | {"SLURM_RESTART_COUNT": "1"},
        cwd="/tmp", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "cannot enter /gone/away" in done.stderr
    assert not (batch.home / "runs").exists()
    assert "requeue 7" in batch.calls


def test_what_the_user_has_squeue_leave_out_does_not_hide_the_job(batch: Batch) -> None:
    batch.set_python("exit 9")
    assert batch.start(1, SQUEUE_PARTITION="other").returncode == 1
    assert "requeue 7" in batch.calls


# --- the site file -------------------------------------------------------------------------------------


def test_a_site_file_is_sourced_in_this_shell_and_may_use_unset_variables(batch: Batch) -> None:
    site = batch.home / "site.sh"
    site.write_text('export SEEN="$NOT_SET_AT_ALL:yes"\n')
    batch.set_python(f'echo "$SEEN" >> {batch.state}/seen; [ "$2" != hpcgpt.train ] || exit 0')
    done = batch.start(HPCGPT_SITE=str(site))
    assert done.returncode == 0, done.stderr
    assert set((batch.state / "seen").read_text().split()) == {":yes"}


def test_the_options_traps_arguments_and_separators_of_a_site_file_do_not_stay(batch: Batch) -> None:
    """With its options or traps for errors this script would end without a decision."""
    site = batch.home / "site.sh"
    site.write_text("set -eEuo pipefail -f\ntrap 'exit 9' ERR\nset -- other arguments\nIFS=/\nexport SEEN=yes\n")
    batch.set_python(f"""[ "$2" != hpcgpt.train ] || {{ echo "$SEEN $*" >> {batch.state}/seen; sleep 3; exit 75; }}""")
    done = batch.start(HPCGPT_SITE=str(site))
    assert done.returncode == 75, done.stderr
    assert (batch.state / "seen").read_text() == f"yes -m hpcgpt.train --run.dir {batch.home}/runs --run.name mine\n"
    assert "requeue 7" in batch.calls


def test_a_site_file_that_ends_the_shell_is_refused(batch: Batch) -> None:
    site = batch.home / "site.sh"
    for text in ("exit 0\n", "set -e\nfalse\n"):
        site.write_text(text)
        done = batch.start(HPCGPT_SITE=str(site))
        assert done.returncode == 2
        assert f"cannot read HPCGPT_SITE={site}: it ends the shell" in done.stderr


def test_what_a_site_file_prints_is_not_taken_for_its_status(batch: Batch) -> None:
    site = batch.home / "site.sh"
    site.write_text("printf '\\001\\033[0m\\002%s\\n7' hpcgpt-1\n")
    batch.set_python('[ "$2" != hpcgpt.train ] || exit 0')
    assert batch.start(HPCGPT_SITE=str(site)).returncode == 0
    site.write_text("printf 'no such module'\nreturn 3\n")
    done = batch.start(HPCGPT_SITE=str(site), POSIXLY_CORRECT="1")
    assert (done.returncode, f"cannot read HPCGPT_SITE={site}: no such module\n" in done.stderr) == (2, True)


def test_a_site_file_is_sourced_whatever_it_prints_and_whatever_the_patience_is(batch: Batch) -> None:
    """Comparing all of the output after each of its lines would take longer than there is time."""
    site = batch.home / "site.sh"
    site.write_text('[ "$0" != hpcgpt ] || seq 100000\nexport SEEN=yes\n')
    batch.set_python(f'echo "$SEEN" >> {batch.state}/seen; [ "$2" != hpcgpt.train ] || exit 0')
    done = batch.start(HPCGPT_SITE=str(site), HPCGPT_PATIENCE_S="5m")
    assert done.returncode == 0, done.stderr
    assert "HPCGPT_PATIENCE_S=5m: expected whole seconds, so it is 300" in done.stderr
    assert set((batch.state / "seen").read_text().split()) == {"yes"}


def test_what_a_site_file_leaves_in_the_background_is_not_waited_for(batch: Batch) -> None:
    """As a tunnel. It has the output of the check, which is named hpcgpt."""
    site = batch.home / "site.sh"
    site.write_text(f'[ "$0" != hpcgpt ] || {{ sleep 60 & echo $! > {batch.state}/left; }}\n')
    batch.set_python('[ "$2" != hpcgpt.train ] || exit 0')
    done = batch.start(HPCGPT_SITE=str(site))
    assert done.returncode == 0, done.stderr
    os.kill(int((batch.state / "left").read_text()), signal.SIGKILL)  # raises if it has ended


def test_a_missing_site_file_is_a_user_error_at_first_and_the_nodes_fault_later(batch: Batch) -> None:
    assert batch.start(HPCGPT_SITE="/nowhere/site.sh").returncode == 2
    assert batch.calls == []
    assert "cannot read HPCGPT_SITE=/nowhere/site.sh" in batch.start(1, HPCGPT_SITE="/nowhere/site.sh").stderr
    assert "requeue 7" in batch.calls


# --- a job of hpcgpt.submit ------------------------------------------------------------------------------


def test_a_submitted_job_runs_the_kept_code_and_is_requeued_where_that_is_gone(batch: Batch) -> None:
    """The job's own script has a copy of the batch script for that case."""
    arguments = ["--run.dir", f"{batch.home}/my runs", "--run.name", "two  'words'"]
    code = code_snapshot.keep(batch.home / "my runs" / "kept", arguments)
    job = batch.home / "job.sh"
    job.write_text("\n".join(["#!/bin/bash", *submission.setup([code]), "echo pickled"]))
    env = batch.env | {"SLURM_RESTART_COUNT": "1"}
    batch.set_field("restarts", "1")
    done = subprocess.run(["bash", str(job)], env=env, cwd=batch.home, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (batch.home / "my runs" / "two  'words'" / "run.json").exists()
    shutil.rmtree(code.folder)
    done = subprocess.run(["bash", str(job)], env=env, cwd=batch.home, capture_output=True, text=True, check=False)
    assert f"{code.folder}, the code that was submitted, cannot be read" in done.stderr
    assert "requeue 7" in batch.calls
    assert "pickled" not in done.stdout


# --- srun has returned -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "again"), [(75, True), (1, True), (137, True), (127, True), (0, False), (2, False), (76, False)]
)
def test_where_python_is_gone_after_srun_the_status_decides(batch: Batch, status: int, again: bool) -> None:
    batch.set_python('[ "$3" != decide ] || exit 127')
    batch.set_field("status", str(status))
    done = batch.start()
    assert done.returncode == status
    assert "no decision: status 127" in done.stderr
    assert ("requeue 7" in batch.calls) == again


def test_a_stop_file_prevents_the_requeue_here_too(batch: Batch) -> None:
    batch.set_python(f'if [ "$3" = decide ]; then touch {batch.home}/runs/mine/STOP; exit 1; fi')
    batch.set_field("status", "75")
    assert "a STOP file keeps the run stopped" in batch.start().stderr
    assert batch.calls == []


def test_a_decision_not_to_requeue_is_final_and_resets_the_count(batch: Batch) -> None:
    batch.set_python('if [ "$3" = decide ]; then echo decided; exit 1; fi')
    batch.set_field("status", "1").set_field("comment", "mine hpcgpt_lost=4")
    batch.start(5)
    assert batch.calls == ["update JobId=7 Comment=mine"]  # the count of failed starts in a row is reset


def test_at_the_time_limit_a_job_is_requeued_without_python_too(batch: Batch) -> None:
    batch.set_python('[ "$3" != decide ] || exit 1')
    batch.set_field("reason", "TimeLimit").set_field("state", "COMPLETING")
    # The signal, and srun's end with it. The script is the parent of the shell that waits for srun.
    (batch.bin / "srun").write_text(
        '#!/bin/bash\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nkill -TERM "$script"\nexit 143\n'
    )
    done = batch.start()
    assert done.returncode == 143
    assert "requeue of job 7, 1 of 5 without hpcgpt.requeue" in done.stderr


def test_the_decision_is_made_while_srun_still_runs(batch: Batch) -> None:
    """As when the ranks hang because a node is gone: srun waits for them, and both are killed."""
    batch.set_python(f'[ "$3" != decide ] || {{ echo "$5" >> {batch.state}/asked; exit 1; }}')
    batch.set_field("reason", "TimeLimit").set_field("state", "COMPLETING")
    (batch.bin / "srun").write_text(
        '#!/bin/bash\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nkill -TERM "$script"\n'
        'until [ -s "$STATE/calls" ]; do sleep 0.1; done\nexit 143\n'
    )
    batch.start()
    assert batch.field("asked").split() == ["ending", "143"]


def test_sbatchs_signal_b_reaches_srun_and_the_status_is_sruns(batch: Batch) -> None:
    """`wait` returns the signal's number when a trap interrupts it."""
    (batch.bin / "srun").write_text(
        '#!/bin/bash\ntrap "exit 75" USR1\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nkill -USR1 "$script"\n'
        "while :; do sleep 0.1; done\n"
    )
    assert batch.start().returncode == 75


def test_a_warning_before_sruns_pid_is_known_is_passed_on_to_it(batch: Batch) -> None:
    """With --signal=B: and a start that takes long, Slurm may warn before srun runs."""
    (batch.bin / "srun").write_text('#!/bin/bash\ntrap "exit 75" USR1\nwhile :; do sleep 0.1; done\n')
    # The shell that prints its pid and becomes srun warns the batch script first.
    batch._program(
        batch.bin / "bash",
        '#!/bin/bash\nif [[ $2 == "echo "* ]]; then\n    read -r _ _ _ script _ < "/proc/$PPID/stat"\n'
        '    kill -USR1 "$script"\n    sleep 0.5\nfi\nexec /bin/bash "$@"\n',
    )
    assert batch.start().returncode == 75


def test_a_line_that_the_time_limit_of_read_divides_is_read_whole(batch: Batch) -> None:
    """The script looks for signals every two seconds. Here that is in the middle of srun's pid, where it warns srun."""
    (batch.bin / "srun").write_text(
        '#!/bin/bash\ntrap "exit 75" USR1\nread -r _ _ _ script _ < "/proc/$PPID/stat"\nsleep 0.5\n'
        'kill -USR1 "$script"\n'
        "for _ in {1..100}; do sleep 0.1; done\nexit 3\n"
    )
    batch._program(
        batch.bin / "bash",
        '#!/bin/bash\nif [[ $2 == "echo "* ]]; then\n    pid=$$\n    printf %s "${pid:0:1}" >&4\n    sleep 3\n'
        '    printf "%s\\n" "${pid:1}" >&4\n    shift 3\n    exec "$@" 2>&1 4>&-\nfi\nexec /bin/bash "$@"\n',
    )
    assert batch.start().returncode == 75


def without_slurm(batch: Batch) -> None:
    """Make HPCGPT_PYTHON run as in a container without Slurm's tools."""
    batch.set_python("case $2 in hpcgpt.train) exit 0 ;; esac; PATH=/usr/bin/nowhere")


def test_slurms_tools_need_not_be_where_python_is(batch: Batch) -> None:
    """The batch script carries out what hpcgpt.requeue decided, and does not count it as a failed start."""
    without_slurm(batch)
    batch.set_field("status", "75").set_field("comment", "mine")
    done = batch.start()
    assert "requeue of job 7: saved, by the ranks' exit status" in done.stderr
    assert batch.calls == ["requeue 7"]
    events = (batch.home / "runs" / "mine" / "events.jsonl").read_text()
    assert '"event": "requeue"' in events
    assert "error" not in done.stderr


def test_a_job_that_is_finished_or_that_slurm_is_ending_is_not_requeued(batch: Batch) -> None:
    without_slurm(batch)
    batch.set_field("status", "0")
    batch.start()
    batch.set_field("status", "75").set_field("state", "COMPLETING")  # the user's scancel
    batch.start()
    assert batch.calls == []


# --- the ranks' signals --------------------------------------------------------------------------------

BLOCKED = sum(1 << (number - 1) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))


def rank_status(batch: Batch) -> dict[str, int]:
    """Return the signal masks of a rank's process before it installs a handler."""
    # Read by bash itself: while it starts a program, which might read them, it blocks signals.
    look = f'kill -TERM $$; mapfile -t lines < /proc/$$/status; printf "%s\\n" "${{lines[@]}}" > {batch.state}/masks'
    batch.set_python(f'if [ "$2" = hpcgpt.train ]; then {look}; exit 0; fi')
    done = batch.start()
    assert done.returncode == 0, done.stderr
    lines = (batch.state / "masks").read_text().splitlines()
    masks = ("SigBlk", "SigPnd", "ShdPnd")
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith(masks)}


def test_a_signal_stays_pending_until_the_rank_has_handlers(batch: Batch) -> None:
    masks = rank_status(batch)
    assert masks["SigBlk"] & BLOCKED == BLOCKED
    assert (masks["ShdPnd"] | masks["SigPnd"]) & 1 << (signal.SIGTERM - 1)


def test_where_env_cannot_block_signals_a_rank_ignores_them(batch: Batch) -> None:
    batch._program(batch.bin / "env", '#!/bin/bash\n[[ $1 != --block* ]] || exit 125\nexec /usr/bin/env "$@"\n')
    assert rank_status(batch)["SigBlk"] & BLOCKED == 0


def test_the_name_of_a_log_is_not_a_pattern(batch: Batch) -> None:
    subprocess.run(
        ["bash", str(SCRIPT), "--run.dir", f"{batch.home}/a%j%%b", "--run.name", "mine"], env=batch.env,
        cwd=batch.home, timeout=60, check=True, capture_output=True,
    )  # fmt: skip
    assert f"--output={batch.home}/a%%j%%%%b/mine/logs/7_0.log" in (batch.state / "srun").read_text().splitlines()

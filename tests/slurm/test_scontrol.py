"""hpcgpt.slurm.scontrol: text that a user may choose is never taken for a field of Slurm's; what its commands get."""

from __future__ import annotations

import os

import pytest

from hpcgpt.slurm import scontrol
from hpcgpt.slurm.scontrol import fields_of

# How Slurm 22.05 shows a job with a free name, arguments and folders.
SHOWN = """\
JobId=2 {array}JobName={name}
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901758 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=01:00:00 TimeMin=N/A
   Partition=low AllocNode:Sid=ctl:5344
   ReqNodeList=(null) ExcNodeList=(null)
   NumNodes=2 NumCPUs=4 NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Socks/Node=* NtasksPerN:B:S:C=2:0:*:* CoreSpec=*
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command={command}
   Comment={comment}
   WorkDir={workdir}
   StdErr=/tmp/out %2 2
   StdIn=/dev/null
   StdOut=/tmp/out %2 2
   Power=
   TresPerNode=gres:gpu:2


"""
PLAIN = {"array": "", "name": "x", "command": "/me/my.sh", "comment": "mine", "workdir": "/me"}
FAKED = "x JobState=CANCELLED Restarts=9 WorkDir=/elsewhere"
BROKEN = "x\n   JobState=CANCELLED\n   Restarts=9\n   WorkDir=/elsewhere"


@pytest.mark.parametrize("text", [FAKED, BROKEN])
@pytest.mark.parametrize("place", ["name", "command", "comment"])
def test_text_chosen_by_the_user_does_not_change_the_fields(place: str, text: str) -> None:
    found = fields_of(SHOWN.format(**PLAIN | {place: text}))
    expected = fields_of(SHOWN.format(**PLAIN))
    assert found | {"JobName": "", "Command": "", "Comment": ""} == expected | {
        "JobName": "", "Command": "", "Comment": ""}  # fmt: skip
    assert (found["JobState"], found["Restarts"], found["WorkDir"]) == ("RUNNING", "0", "/me")


def test_values_keep_their_spaces() -> None:
    found = fields_of(SHOWN.format(**PLAIN | {"name": "a b", "workdir": "/me/my own", "command": "/my own/s.sh a  b"}))
    assert found["JobName"] == "a b"
    assert found["WorkDir"] == "/me/my own"
    assert found["Command"] == "/my own/s.sh a  b"
    assert found["StdOut"] == "/tmp/out %2 2"
    assert (found["TresPerNode"], found["OverSubscribe"], found["ExcNodeList"]) == ("gres:gpu:2", "OK", "(null)")


def test_of_several_jobs_the_first_counts_also_for_a_task_of_an_array() -> None:
    text = SHOWN.format(**PLAIN | {"array": "ArrayJobId=1 ArrayTaskId=3 "})
    more = SHOWN.format(**PLAIN | {"workdir": "/other", "name": "y"}).replace("RUNNING", "PENDING")
    found = fields_of(text.rstrip("\n") + "\n\n" + more)
    assert (found["JobId"], found["ArrayJobId"], found["ArrayTaskId"]) == ("2", "1", "3")
    assert (found["JobState"], found["WorkDir"], found["JobName"]) == ("RUNNING", "/me", "x")


def test_without_an_answer_there_are_no_fields() -> None:
    assert fields_of("") == {}
    assert fields_of("slurm_load_jobs error: Invalid job id specified\n") == {}


@pytest.mark.processes
def test_slurms_commands_get_no_variable_that_hides_jobs_or_has_sbatch_wait_for_the_end() -> None:
    given = {"SQUEUE_PARTITION": "a", "SINFO_ALL": "1", "SBATCH_WAIT": "1"}
    kept = {"SBATCH_WAIT_ALL_NODES": "1", "SBATCH_WAIT4SWITCH": "5", "PATH": os.environ["PATH"]}
    printed = scontrol.run("env", env=given | kept).stdout.split()
    assert sorted(printed) == sorted(f"{name}={value}" for name, value in [*kept.items(), ("SLURM_TIME_FORMAT", "%s")])

"""Why Slurm lets a job wait: the reason of squeue, in plain words, with what a user can do.

The reasons are those of squeue(1), "job reason codes", and of Slurm's own table (src/common/job_state_reason.c, Slurm
22.05 to 25.11). Most of them are one sentence in one word, so they are taken apart (`_LIMIT`):

    QOS Max CPU Minutes PerJob Limit     limit of the QOS, at most, CPU minutes, of each job
    Assoc Grp GRES                       limit of the account, of all its jobs together, GPUs

What matters most is whether waiting helps. A limit of each job or node is one that this job exceeds by itself: it will
never start as it was submitted. A limit of a user, an account or a QOS has room again as soon as other jobs end.

No torch in here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """`meaning` and `action` are sentences without a full stop. `waiting_helps`: may the job start as it is?"""

    meaning: str
    action: str
    waiting_helps: bool = True

    def __str__(self) -> str:
        return f"{self.meaning}; {self.action}" if self.action else self.meaning


_NONE = ("", "None", "(null)", "N/A")
_WAIT = "nothing to do but wait"
_RELEASE = "scontrol release {job}"
_SITE = "ask the cluster's support"
_AGAIN = "scancel {job}, and submit it again with "

_REASONS = {
    "Priority": Explanation(
        "jobs with a higher priority are ahead of it",
        "a shorter --time may fit into a gap before them; `sprio -j {job}` shows what its priority consists of",
    ),
    "Resources": Explanation("it is next, as soon as enough nodes or GPUs are free", _WAIT),
    "Dependency": Explanation("it waits for the end of another job", "`squeue -j {job} -o %E` shows which"),
    "DependencyNeverSatisfied": Explanation(
        "the job that it waits for did not end as its --dependency requires", _AGAIN + "another --dependency", False
    ),
    "BeginTime": Explanation(
        "it may not start before a certain time: its --begin, or Slurm's delay after a requeue", _WAIT
    ),
    "JobHeldUser": Explanation("its owner, or a coordinator of the account, holds it", _RELEASE, False),
    "JobHeldAdmin": Explanation("an administrator holds it", _SITE, False),
    "JobHoldMaxRequeue": Explanation(
        "it was requeued as often as this Slurm allows, and is held now",
        f"see why its starts fail (`hpcgpt status RUN --why`), then {_RELEASE}",
        False,
    ),
    "JobArrayTaskLimit": Explanation("its job array already runs as many tasks as --array=...%N allows", _WAIT),
    "ReqNodeNotAvail": Explanation(
        "nodes that it needs are down, drained or reserved, often for a maintenance that begins within its --time",
        "`scontrol show reservation` and `sinfo -R` show which; a --time that ends before the maintenance, or no "
        "--nodelist, lets it start earlier",
    ),
    "Reservation": Explanation("it waits for its reservation to begin", "`scontrol show reservation` shows when"),
    "ReservationDeleted": Explanation("its reservation no longer exists", _AGAIN + "another --reservation", False),
    "ReservationInvalid": Explanation("its reservation cannot be used", _AGAIN + "another --reservation", False),
    "PartitionTimeLimit": Explanation(
        "its --time is longer than the partition allows",
        "scontrol update JobId={job} TimeLimit=HH:MM:SS; `sinfo -o '%P %l'` shows the limits",
        False,
    ),
    "PartitionNodeLimit": Explanation(
        "it asks for more nodes than the partition allows, or has usable at the moment",
        _AGAIN + "fewer --nodes; `sinfo -o '%P %s %D %t'` shows the limits",
        False,
    ),
    "PartitionConfig": Explanation(
        "the partition does not allow this job: its account, QOS, size or time", _AGAIN + "another --partition", False
    ),
    "PartitionDown": Explanation("the partition starts no jobs at the moment", "wait, or " + _AGAIN + "another one"),
    "PartitionInactive": Explanation(
        "the partition neither starts nor takes jobs at the moment", "wait, or " + _AGAIN + "another one"
    ),
    "Constraints": Explanation("no node with the features of its --constraint is usable at the moment", _WAIT),
    "BadConstraints": Explanation(
        "no node of the partition has what it asks for",
        _AGAIN + "other --constraint, --gpus-per-node, --mem or --partition",
        False,
    ),
    "MaxMemPerLimit": Explanation(
        "it asks for more memory per node or per CPU than is allowed", _AGAIN + "a smaller --mem", False
    ),
    "Licenses": Explanation("all licenses of the kind that it asks for are in use", _WAIT),
    "NodeDown": Explanation("a node that it needs is down", "wait, or " + _AGAIN + "no --nodelist"),
    "FrontEndDown": Explanation("no front end node can start it", _WAIT),
    "Cleaning": Explanation("its last start is still being cleaned up", _WAIT),
    "Prolog": Explanation("the nodes are being prepared for it", _WAIT),
    "SchedDefer": Explanation("it could not start at once, as it asked for", _SITE, False),
    "InvalidAccount": Explanation(
        "its account does not exist, or you may not use it",
        _AGAIN + "another --account; `sacctmgr show associations user=$USER` lists yours",
        False,
    ),
    "InvalidQOS": Explanation("its QOS does not exist, or you may not use it", _AGAIN + "another --qos", False),
    "AccountNotAllowed": Explanation(
        "the partition does not take jobs of its account", _AGAIN + "another --account or --partition", False
    ),
    "QOSNotAllowed": Explanation(
        "its account or partition does not allow its QOS", _AGAIN + "another --qos or --partition", False
    ),
    "QOSUsageThreshold": Explanation(
        "its account has used too much of its share for this QOS", "wait, or " + _AGAIN + "another --qos"
    ),
    "AssociationJobLimit": Explanation("its account already runs as many jobs as it may", _WAIT),
    "AssociationResourceLimit": Explanation("its account already uses as much as it may", _WAIT),
    "AssociationTimeLimit": Explanation(
        "the time limit, or the used-up time, of its account is reached", "a shorter --time, or another --account"
    ),
    "QOSJobLimit": Explanation("its QOS already runs as many jobs as it may", _WAIT),
    "QOSResourceLimit": Explanation("its QOS already uses as much as it may", _WAIT),
    "QOSTimeLimit": Explanation("its --time is longer than its QOS allows", "a shorter --time, or another --qos"),
    "AccountingPolicy": Explanation(
        "a limit of its account or QOS holds it back",
        "`sacctmgr show associations user=$USER` and `sacctmgr show qos` list them",
    ),
    "DeadLine": Explanation("it cannot end before its --deadline any more", _AGAIN + "a later one", False),
    "FedJobLock": Explanation("the clusters of the federation agree on where it runs", _WAIT),
    "BurstBufferResources": Explanation("the burst buffer has no room for it yet", _WAIT),
    "BurstBufferStageIn": Explanation("its files are being copied to the burst buffer", _WAIT),
    "BurstBufferOperation": Explanation("its burst buffer failed", _SITE, False),
    "PowerNotAvail": Explanation("there is not enough electric power for it at the moment", _WAIT),
    "PowerReserved": Explanation("electric power is reserved for other jobs", _WAIT),
    # A requeued job may still show how its last start ended, until the scheduler looks at it again.
    "JobLaunchFailure": Explanation("its last start could not be launched", "see the log of that start"),
    "NonZeroExitCode": Explanation("its last start ended with an error", "see `hpcgpt status RUN --why`"),
    "RaisedSignal": Explanation("its last start was ended by a signal", "see `hpcgpt status RUN --why`"),
    "TimeLimit": Explanation("its last start reached its time limit", _WAIT),
    "InactiveLimit": Explanation("its last start was inactive for too long", _SITE),
    "OutOfMemory": Explanation("its last start ran out of memory", "see `hpcgpt status RUN --why`"),
    "SystemFailure": Explanation("its last start ended with a failure of Slurm itself", _SITE),
}

# Reasons that Slurm writes as sentences, by their beginning, in lower case.
_SENTENCES = {
    "launch failed requeued held": Explanation(
        "it could not be launched on its nodes, and is held now",
        f"see slurmd's reason with your support, then {_RELEASE}",
        False,
    ),
    "job requeued in held state": Explanation(
        "it was requeued by `scontrol requeuehold`, and is held", _RELEASE, False
    ),
    "nodes required for job are down": Explanation(
        "nodes that it could use are down, drained, or reserved for jobs of another partition",
        "`sinfo -R` shows which",
    ),
    "nodes required by job are down": Explanation("nodes that it could use are down", "`sinfo -R` shows which"),
}

# What a limit is on, and what a job can ask for less of.
_RESOURCES = {
    "cpu": ("CPU", "fewer cores"), "mem": ("memory", "a smaller --mem"), "memory": ("memory", "a smaller --mem"),
    "node": ("node", "fewer --nodes"), "gres": ("GPU", "fewer GPUs"), "job": ("job", "fewer jobs"),
    "submitjob": ("submitted job", "fewer jobs"), "license": ("license", "fewer licenses"),
    "bb": ("burst buffer", "less burst buffer"), "billing": ("billing unit", "a smaller size"),
    "energy": ("energy", "less energy"), "wall": ("time", "a shorter --time"),
    "wallduration": ("time", "a shorter --time"), "unknown": ("another resource", "less of it"),
}  # fmt: skip
_COUNTED = ("CPU", "node", "GPU", "job", "submitted job", "license", "billing unit")
_LIMIT = re.compile(
    r"(?P<owner>Assoc|QOS)?(?P<kind>Grp|Max|Min)"
    r"(?P<what>CPU|Memory|Mem|Node|GRES|SubmitJob|Job|License|BB|Billing|Energy|WallDuration|Wall|Unknown)s?"
    r"(?P<running>Run)?(?P<minutes>Min(?:ute)?s)?(?:Per(?P<each>Job|Node|User|Account))?(?:NotSatisfied)?(?:Limit)?",
    re.IGNORECASE,
)


def explain(reason: str, job: str = "") -> Explanation | None:
    """Explain a reason as squeue prints it; None if Slurm gives none (yet). `job` is put into the commands to type.

    A reason that is not in the tables, as of a newer Slurm, is explained as just that.
    """
    reason = reason.strip()
    word = reason.partition(",")[0].strip()
    if word in _NONE:
        return None
    sentence = reason.replace("_", " ").lower()
    found = _REASONS.get(word) or next(
        (known for begin, known in _SENTENCES.items() if sentence.startswith(begin)), None
    )
    found = found or _explain_limit(word) or Explanation("a reason that only this Slurm has", _SITE)
    return Explanation(found.meaning, found.action.replace("{job}", job or "JOB"), found.waiting_helps)


def is_held(state: str, reason: str) -> bool:
    """Is a pending job held, so that it stays in the queue until it is released?"""
    sentence = reason.replace("_", " ").lower()
    return (
        state in ("REQUEUE_HOLD", "SPECIAL_EXIT")
        or reason.startswith(("JobHeld", "JobHoldMaxRequeue"))
        or sentence.startswith(("launch failed requeued held", "job requeued in held state"))
    )


def _explain_limit(word: str) -> Explanation | None:
    """Take apart the name of a limit of an account or a QOS."""
    found = _LIMIT.fullmatch(word)
    if not found:
        return None
    of_qos = (found["owner"] or "QOS").upper() == "QOS"
    owner, other = ("the QOS", "another --qos") if of_qos else ("the account", "another --account")
    name, less = _RESOURCES[found["what"].lower()]
    if found["minutes"]:
        name, less = f"{name} minutes", "a shorter --time or a smaller size"
    elif name in _COUNTED:
        name += "s"
    kind, each = found["kind"].lower(), (found["each"] or "").lower()
    if kind == "min":
        return Explanation(f"it asks for less than {owner} requires: {name}", f"{_AGAIN}more, or {other}", False)
    if kind == "grp" and found["minutes"] and not found["running"]:
        return Explanation(
            f"{owner} has used up its budget of {name}",
            f"wait until it is filled up, or {_AGAIN}{other}; `sshare` shows what is left",
        )
    if kind == "grp":
        running = ", counting what running jobs may still use" if found["running"] else ""
        return Explanation(f"all jobs of {owner} together have reached its limit on {name}{running}", _WAIT)
    if each in ("job", "node"):
        return Explanation(
            f"it is above the limit of {owner} on {name} per {each}", f"{_AGAIN}{less}, or {other}", False
        )
    whose = "all jobs of the account" if each == "account" else "all jobs of this user"
    return Explanation(f"{whose} together have reached the limit of {owner} on {name}", _WAIT)

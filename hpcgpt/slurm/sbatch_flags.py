"""The flags of sbatch, under its own names: which there are, and their values on a command line.

From sbatch(1) of Slurm 22.05 to 24.11. A flag of a plugin of the site is not among them: `hpcgpt submit` takes it as
``--sbatch NAME[=VALUE]``.

No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hpcgpt.errors import UserError

_WITH_VALUE = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type mail-user
    mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core
    ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition power prefer priority profile qos
    reservation segment signal sockets-per-node switches tasks-per-node thread-spec threads-per-core time time-min tmp
    tres-bind tres-per-task uid wait-all-nodes wckey wrap
"""
_WITHOUT_VALUE = """
    contiguous hold no-requeue overcommit oversubscribe parsable quiet reboot requeue spread-job stepmgr test-only
    use-min-nodes verbose wait
"""
WITH_VALUE = frozenset(_WITH_VALUE.split())
WITHOUT_VALUE = frozenset(_WITHOUT_VALUE.split())
# A value needs ``=``: sbatch takes the next argument for the script.
VALUE_OPTIONAL = frozenset(["exclusive", "get-user-env", "nice", "no-kill", "propagate"])
NAMES = WITH_VALUE | WITHOUT_VALUE | VALUE_OPTIONAL

SHORT = {
    "A": "account", "a": "array", "b": "begin", "C": "constraint", "c": "cpus-per-task", "d": "dependency",
    "D": "chdir", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "i": "input", "J": "job-name",
    "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "n": "ntasks", "N": "nodes", "o": "output",
    "O": "overcommit", "p": "partition", "q": "qos", "s": "oversubscribe", "S": "core-spec", "t": "time",
    "W": "wait", "w": "nodelist", "x": "exclude",
}  # fmt: skip

GPU_FLAGS = ("gpus-per-node", "gpus", "gpus-per-task", "gres", "tres-per-task")
MEMORY_FLAGS = ("mem", "mem-per-cpu", "mem-per-gpu")

# The flags that have a variable: sbatch(1), "input environment variables". Most are named like their flag.
_HAVE_VARIABLES = """
    account acctg-freq array batch clusters constraint container core-spec cpus-per-gpu delay-boot distribution error
    exclusive export get-user-env gpu-bind gpu-freq gpus gpus-per-node gpus-per-task gres gres-flags hint input job-name
    mem mem-bind mem-per-cpu mem-per-gpu network no-kill no-requeue open-mode output overcommit partition power profile
    qos requeue reservation signal spread-job switches thread-spec threads-per-core time tres-bind tres-per-task
    use-min-nodes wait wait-all-nodes wckey
"""
_WITH_VARIABLE = frozenset(_HAVE_VARIABLES.split())
_OTHER_VARIABLES = {
    "array": "SBATCH_ARRAY_INX", "mem": "SBATCH_MEM_PER_NODE", "switches": "SBATCH_REQ_SWITCH",
    "time": "SBATCH_TIMELIMIT",
}  # fmt: skip
# Of the flags in one line, sbatch takes one or two that agree.
_TOGETHER = (GPU_FLAGS, MEMORY_FLAGS, ("requeue", "no-requeue"), ("cpus-per-task", "cpus-per-gpu"))

Flags = dict[str, str]  # by name; the value is "" for a flag without one


def split(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """Separate sbatch's flags from all other arguments, whose order is kept. Of a repeated flag the last one counts.

    Raises:
        UserError: a flag that needs a value has none, or one that has none has a value.
    """
    flags: Flags = {}
    others: list[str] = []
    rest = list(reversed(argv))
    while rest:
        argument = rest.pop()
        if re.match(r"--\w+\.", argument):  # a key of the configuration, and its value
            others += [argument, *([] if "=" in argument else [rest.pop() for _ in rest[-1:]])]
            continue
        name, given, value = _flag(argument)
        if name not in NAMES:
            others.append(argument)
        elif name in WITH_VALUE and not given:
            if not rest or rest[-1].startswith("--"):  # sbatch would take the next flag for the value
                raise UserError(f"--{name} needs a value: --{name}=...")
            flags[name] = rest.pop()
        elif name in WITHOUT_VALUE and given:
            raise UserError(f"--{name} has no value, but {argument} gives it one")
        else:
            flags[name] = value
    if "tasks-per-node" in flags:  # sbatch accepts it as another name
        flags["ntasks-per-node"] = flags.pop("tasks-per-node")
    return flags, others


def from_environment(written: Flags, environment: Mapping[str, str]) -> Flags:
    """Return the flags that the user wrote, and those that sbatch would read from its SBATCH_ variables.

    A flag that is written replaces its variable, and those of flags that ask for the same in another form. SBATCH_WAIT
    is left out: it is no property of the job, and submit returns when the job is queued.
    """
    taken = {"wait"}.union(written).union(*(group for group in _TOGETHER if written.keys() & set(group)))
    found = {name: environment[variable] for name in sorted(_WITH_VARIABLE - taken)
             if (variable := _variable(name)) in environment}  # fmt: skip
    return {name: "" if name in WITHOUT_VALUE else value for name, value in found.items()} | written


def without_variables(flags: Flags, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables by which sbatch would replace these flags of a script.

    For sbatch they come before the #SBATCH lines of a script, which is where a job of submit has all its flags.
    """
    names = set(flags).union(*(group for group in _TOGETHER if flags.keys() & set(group)))
    return {key: value for key, value in environment.items() if key not in {_variable(name) for name in names}}


def _variable(flag: str) -> str:
    return _OTHER_VARIABLES.get(flag, f"SBATCH_{flag.upper().replace('-', '_')}")


def _flag(argument: str) -> tuple[str, bool, str]:
    """Return the long name of a flag, whether it has a value in the same argument, and that value."""
    if argument.startswith("--"):
        name, given, value = argument[2:].partition("=")
        return name, bool(given), value
    if re.match("-[A-Za-z]", argument) and argument[1] in SHORT:
        value = argument[2:].removeprefix("=")
        return SHORT[argument[1]], bool(argument[2:]), value
    return "", False, ""

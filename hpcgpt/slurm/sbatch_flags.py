"""The flags of sbatch, under its own names: which there are, and their values on a command line.

From sbatch(1) of Slurm 22.05 to 24.11. A flag of a plugin of the site is not among them: `hpcgpt submit` takes it as
``--sbatch NAME[=VALUE]``.

No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
            if not rest:
                raise UserError(f"--{name} needs a value: --{name}=...")
            flags[name] = rest.pop()
        elif name in WITHOUT_VALUE and given:
            raise UserError(f"--{name} has no value, but {argument} gives it one")
        else:
            flags[name] = value
    if "tasks-per-node" in flags:  # sbatch accepts it as another name
        flags["ntasks-per-node"] = flags.pop("tasks-per-node")
    return flags, others


def _flag(argument: str) -> tuple[str, bool, str]:
    """Return the long name of a flag, whether it has a value in the same argument, and that value."""
    if argument.startswith("--"):
        name, given, value = argument[2:].partition("=")
        return name, bool(given), value
    if re.match("-[A-Za-z]", argument) and argument[1] in SHORT:
        value = argument[2:].removeprefix("=")
        return SHORT[argument[1]], bool(argument[2:]), value
    return "", False, ""

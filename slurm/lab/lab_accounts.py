"""Accounting in a lab: a database server and slurmdbd on ctl, so that there are QOS, accounts and their limits.

The database is in the lab's state folder and listens inside of ctl only; a database of this machine is not read,
stopped or changed.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Final

import lab_needs
from lab_conf import DBD_PORT, Lab
from lab_hosts import LabError, run, start_daemon

DATABASE_PORT: Final = 26820  # in ctl's own network


def start(lab: Lab) -> None:
    """Start both, and add this cluster: before slurmctld, which connects to slurmdbd when it starts."""
    if missing := lab_needs.missing_packages(lab_needs.FOR_ACCOUNTING):
        raise LabError(
            f"a lab with accounting needs packages that are not installed: apt-get install {' '.join(missing)}, or "
            "`check --install`",
            lab_needs.CANNOT,
        )
    _start_database(lab)
    conf = lab.state / "slurmdbd.conf"
    conf.touch(mode=0o600)  # slurmdbd requires it
    conf.write_text(slurmdbd_conf(lab))
    start_daemon(lab, "ctl", "slurmdbd")
    _sacctmgr(lab, "add", "cluster", lab.name, patience_s=20)


def fill(lab: Lab) -> None:
    """Carry out `lab.accounts`, once slurmctld has registered the kinds of resources, such as gres/gpu."""
    for line in lab.accounts.splitlines():
        _sacctmgr(lab, *shlex.split(line))


def slurmdbd_conf(lab: Lab) -> str:
    return f"""\
AuthType=auth/munge
AuthInfo=socket={lab.state}/munge/ctl/socket
DbdHost=ctl
DbdAddr={lab.addresses["ctl"]}
DbdPort={DBD_PORT}
SlurmUser=root
LogFile={lab.state}/log/dbd.log
PidFile={lab.state}/pid/dbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={DATABASE_PORT}
StorageUser=root
StorageLoc=slurm
"""


def _start_database(lab: Lab) -> None:
    data, socket = lab.state / "database", lab.state / "database/socket"
    # --no-defaults: what this machine's own database has in /etc does not count.
    run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
         "--auth-root-authentication-method=normal", "--skip-name-resolve"], timeout_s=60)  # fmt: skip
    server = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket}",
              "--bind-address=127.0.0.1", f"--port={DATABASE_PORT}", f"--log-error={lab.state}/log/database.log",
              "--skip-name-resolve", "--innodb-buffer-pool-size=32M"]  # fmt: skip
    # It does not put itself into the background.
    start_daemon(lab, "ctl", "sh", "-c", '"$@" &', "sh", *server)
    _wait_for(socket, timeout_s=30)


def _wait_for(path: Path, timeout_s: float) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > give_up_at:
            raise LabError(f"there is no {path} after {timeout_s:g} s")
        time.sleep(0.05)


def _sacctmgr(lab: Lab, *arguments: str, patience_s: float = 0) -> None:
    """Run sacctmgr; try again for `patience_s`, while slurmdbd makes its tables."""
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            run(["sacctmgr", "--immediate", *arguments], env=lab.environ())
        except LabError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.2)
        else:
            return

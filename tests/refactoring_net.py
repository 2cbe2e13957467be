"""Proves that a refactoring changed nothing that is promised: ``python tests/refactoring_net.py --against COMMIT``.

The code of a commit (or of a folder) and the present code make the same runs, shards and help texts on this machine,
one after the other, and every file has to have the same hash: see `refactoring_outcomes` for what is made. Then the
present code continues runs of the old one, and verifies its shards and checkpoints. Hashes of another machine say
nothing, since its kernels round in another way; so both are made here.

Status 0: all are equal. 1: something differs, each of which is named. ``--except 'help: words*'`` leaves out what
was changed on purpose. ``--record FILE`` keeps the hashes as JSON.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from preloaded import Preloaded
from refactoring_outcomes import Code, Outcome, environment, helps, make_inputs, of_old, plan, write_corpus

ROOT = Path(__file__).resolve().parent.parent
Outcomes = dict[str, Outcome]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare what two versions of the code make, byte for byte.")
    parser.add_argument("--against", required=True, metavar="COMMIT|FOLDER", help="the old code")
    parser.add_argument("--code", default=ROOT, type=Path, metavar="FOLDER", help="the new code (default: this one)")
    parser.add_argument("--except", dest="leave_out", action="append", default=[], metavar="PATTERN",
                        help="outcomes that may differ, as 'help: words*'; may be repeated")  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="FILE", help="write all hashes there, as JSON")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="outcomes made at a time (default: 2)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="two runs, shards and help")
    sizes.add_argument("--all", dest="size", action="store_const", const="all", help="every combination of settings")
    options = parser.parse_args()
    size = options.size or "usual"
    with tempfile.TemporaryDirectory(prefix="hpcgpt-net-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        old_code = unpacked(options.against, folder / "code")
        old = make(old_code, folder, size, options.jobs)
        new = make(options.code.resolve(), folder, size, options.jobs, folder / "old")
    different = report(old, new, options.leave_out)
    if options.record:
        hashes = {outcome: {name: _hash(content) for name, content in files.items()} for outcome, files in new.items()}
        record = {"against": options.against, "size": size, "different": different, "hashes": hashes}
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if different else 0


def unpacked(code: str, folder: Path) -> Path:
    """The folder of the old code: the one that is named, or `folder` with the files of a commit."""
    if Path(code).is_dir():
        return Path(code).resolve()
    folder.mkdir()
    packed = subprocess.run(["git", "-C", ROOT, "archive", code], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    return folder


def make(root: Path, folder: Path, size: str, jobs: int, old: Path | None = None) -> Outcomes:
    """All outcomes of the code at `root`. Made in folder/work, which is called folder/old afterwards if that is free.

    Raises:
        RuntimeError: another code than this would have run.
    """
    started_at, work = time.monotonic(), folder / "work"
    work.mkdir()
    where = "import hpcgpt, data_prep; print(hpcgpt.__file__); print(data_prep.__file__)"
    found = subprocess.run([sys.executable, "-c", where], env=environment(root), cwd=work, capture_output=True,
                           text=True, check=True).stdout.splitlines()  # fmt: skip
    if found != [str(root / package / "__init__.py") for package in ("hpcgpt", "data_prep")]:
        raise RuntimeError(f"{root} holds no code that python would run: it runs {' and '.join(found)}")
    preloaded = Preloaded(code=root)
    code = Code(root, work, folder / "corpus", preloaded, old)
    try:
        made = make_inputs(code) | _all(plan(size), code, jobs) | _all(of_old(size), code, jobs) | helps(code)
    finally:
        preloaded.close()
    if old is None:
        work.rename(folder / "old")
    count = sum(map(len, made.values()))
    print(f"{root}: {len(made)} outcomes, {count} files, {time.monotonic() - started_at:.0f} s", flush=True)
    return made


def _all(outcomes: dict[str, Callable[[Code], Outcome]], code: Code, jobs: int) -> Outcomes:
    """An outcome that cannot be made is one, too: that of its error, which is no other version's."""

    def attempt(one: Callable[[Code], Outcome]) -> Outcome:
        try:
            return one(code)
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            return {"error": f"{code.root}: {error!r}".encode()}

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(outcomes, pool.map(attempt, outcomes.values()), strict=True))


def report(old: Outcomes, new: Outcomes, leave_out: list[str]) -> list[str]:
    """Print a line for each outcome, and the first differing line of each text; returns what differs."""
    different = []
    for outcome in old | new:
        before, after = old.get(outcome, {}), new.get(outcome, {})
        names = [name for name in before | after if before.get(name) != after.get(name)]
        allowed = any(fnmatch.fnmatch(outcome, pattern) for pattern in leave_out)
        verdict = ("different, as allowed: " if allowed else "DIFFERENT: ") + ", ".join(names) if names else "equal"
        whole = _hash(b"".join(name.encode() + _hash(content).encode() for name, content in sorted(after.items())))
        print(f"{outcome:48} {len(after):4} files  {whole[:16]}  {verdict}")
        if names and not allowed:
            different += [f"{outcome}: {name}" for name in names]
            for name in names:
                print(_first_difference(name, before.get(name), after.get(name)))
    return different


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _first_difference(name: str, before: bytes | None, after: bytes | None) -> str:
    if before is None or after is None:
        return f"    {name}: only of the {'new' if before is None else 'old'} code"
    try:
        lines = difflib.ndiff(before.decode().splitlines(), after.decode().splitlines())
    except UnicodeDecodeError:
        return f"    {name}: {_hash(before)[:16]} {_hash(after)[:16]}"
    shown = [line[:400] for line in lines if line[:1] in "+-"][:4]
    return "\n".join([f"    {name}:", *(f"        {line}" for line in shown)])


if __name__ == "__main__":
    sys.exit(main())

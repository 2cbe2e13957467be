"""Compares two versions of the code: ``python -m tests.refactoring_net --against COMMIT``.

Both make the same runs, shards and help texts on this machine, one after the other, and every file must have the same
hash: `refactoring_outcomes` lists what is made. Then the new code continues runs of the old one, and verifies its
shards and checkpoints. Hashes of another machine prove nothing, since its kernels round differently.

Status 0: all are equal. 1: something differs, and is named. ``--except '*: words'`` allows help texts whose words were
changed on purpose. ``--record FILE`` writes the hashes as JSON.
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
from dataclasses import dataclass
from pathlib import Path

from tests.preloaded import Preloaded
from tests.refactoring_code import Code, Outcome, environment
from tests.refactoring_outcomes import make_inputs, of_old, plan, write_corpus

ROOT = Path(__file__).resolve().parent.parent
Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Choice:
    """Which outcomes are made: all combinations of settings if `every`, names that match `only`, `jobs` at a time."""

    every: bool
    only: list[str]
    jobs: int

    def has(self, outcome: str) -> bool:
        return not self.only or any(fnmatch.fnmatch(outcome, pattern) for pattern in self.only)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare what two versions of the code make, byte for byte.")
    parser.add_argument("--against", required=True, metavar="COMMIT|FOLDER", help="the old code")
    parser.add_argument(
        "--all", action="store_true", help="every combination of settings, and not a half that has every pair"
    )
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN",
                        help="make these outcomes only, as 'run: *'; may be repeated")  # fmt: skip
    parser.add_argument("--except", dest="allowed", action="append", default=[], metavar="PATTERN",
                        help="OUTCOME: FILE that may differ, as '*: words'; may be repeated")  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="FILE", help="write all hashes there, as JSON")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="outcomes made at a time (default: 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpcgpt-net-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        choice = Choice(options.all, options.only, options.jobs)
        old = make(unpacked(options.against, folder / "code"), folder, choice)
        new = make(ROOT, folder, choice, folder / "old")
    different = report(old, new, options.allowed)
    if options.record:
        hashes = {outcome: {name: _hash(content) for name, content in files.items()} for outcome, files in new.items()}
        record = {"against": options.against, "different": different, "hashes": hashes}
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if different else 0


def unpacked(code: str, folder: Path) -> Path:
    """Return the folder of the old code: the one that is named, or `folder` with the files of a commit."""
    if Path(code).is_dir():
        return Path(code).resolve()
    folder.mkdir()
    packed = subprocess.run(["git", "-C", ROOT, "archive", code], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    return folder


def make(root: Path, folder: Path, choice: Choice, old: Path | None = None) -> Outcomes:
    """Make the outcomes of the code at `root` in folder/work. Without `old` it is renamed folder/old afterwards.

    Raises:
        RuntimeError: python would run other code.
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
        made = make_inputs(code) | _all(plan(root, choice.every), code, choice)
        made |= _all(of_old(), code, choice)
    finally:
        preloaded.close()
    if old is None:
        work.rename(folder / "old")
    made = {outcome: _anywhere(files, folder) for outcome, files in made.items()}
    count = sum(map(len, made.values()))
    print(f"{root}: {len(made)} outcomes, {count} files, {time.monotonic() - started_at:.0f} s", flush=True)
    return made


def _anywhere(outcome: Outcome, folder: Path) -> Outcome:
    """Replace the temporary folder by a fixed name, so that hashes of different days can be compared."""
    return {name: content.replace(bytes(folder), b"FOLDER") for name, content in outcome.items()}


def _all(outcomes: dict[str, Callable[[Code], Outcome]], code: Code, choice: Choice) -> Outcomes:
    """Make the chosen outcomes. One that cannot be made counts as a difference, also where both versions fail alike."""

    def attempt(one: Callable[[Code], Outcome]) -> Outcome:
        try:
            return one(code)
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            return {"error": f"of the {'new' if code.old else 'old'} code: {error!r}".encode()}

    chosen = {name: one for name, one in outcomes.items() if choice.has(name)}
    with ThreadPoolExecutor(choice.jobs) as pool:
        return dict(zip(chosen, pool.map(attempt, chosen.values()), strict=True))


def report(old: Outcomes, new: Outcomes, allowed: list[str]) -> list[str]:
    """Print a line for each outcome, and the first differing lines of each text; return what differs."""
    different = []
    for outcome in old | new:
        before, after = old.get(outcome, {}), new.get(outcome, {})
        names = [name for name in before | after if before.get(name) != after.get(name)]
        as_allowed = [name for name in names if any(fnmatch.fnmatch(f"{outcome}: {name}", one) for one in allowed)]
        wrong = [name for name in names if name not in as_allowed]
        verdict = f"DIFFERENT: {', '.join(wrong)}" if wrong else "equal"
        verdict += f"; different, as allowed: {', '.join(as_allowed)}" if as_allowed else ""
        whole = _hash(b"".join(name.encode() + _hash(content).encode() for name, content in sorted(after.items())))
        print(f"{outcome:48} {len(after):4} files  {whole[:16]}  {verdict}")
        for name in wrong:
            print(_first_difference(name, before.get(name), after.get(name)))
        different += [f"{outcome}: {name}" for name in wrong]
    return different


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _first_difference(name: str, before: bytes | None, after: bytes | None) -> str:
    if before is None or after is None:
        text = f"\n        {(after or before or b'').decode()[-2000:]}" if name == "error" else ""
        return f"    {name}: only of the {'new' if before is None else 'old'} code{text}"
    try:
        lines = difflib.ndiff(before.decode().splitlines(), after.decode().splitlines())
    except UnicodeDecodeError:
        return f"    {name}: {_hash(before)[:16]} {_hash(after)[:16]}"
    shown = [line[:400] for line in lines if line[:1] in "+-"][:4]
    return "\n".join([f"    {name}:", *(f"        {line}" for line in shown)])


if __name__ == "__main__":
    sys.exit(main())

"""Make a bundle: one archive that installs hpcgpt, and runs the quick start, where there is no network.

    make bundle [ARCH=aarch64] [PYTHON_VERSION=3.12] [SHARDS=data/shards] [TOKENIZER=FOLDER] [ARGS=--pip=...]

Run it where there is a network, as on a login node. The archive ``hpcgpt-VERSION-cp311-x86_64.tar`` holds::

    install.sh             checks architecture, Python and every file; makes a virtual environment
    target.sh              what the wheels are for
    wheels/                hpcgpt's own (with GPT-2's vocabulary, batch scripts and site files), and all that it needs
    requirements.txt       each wheel's version and SHA-256, for `pip install --require-hashes`
    quickstart.sh, data/   the quick start and its text; the folders of TOKENIZER and SHARDS
    manifest.json          versions, commit, size and SHA-256 of each file
    SHA256SUMS             the same for sha256sum

Equal wheels and data give an equal archive, byte for byte.
"""

from __future__ import annotations

import argparse
import email.message
import email.parser
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from hpcgpt import cli
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from hpcgpt.slurm import code_snapshot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ARCHITECTURES = ("x86_64", "aarch64")
# Of manylinux. A wheel for an older glibc runs on a newer one: 2.28 is that of RHEL 8 and later.
GLIBC = ("2_28", "2_27", "2_24", "2_17", "2014")
_MANYLINUX = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
_CHUNK = 1 << 20


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if not re.fullmatch(r"3\.\d+", options.python_version):
        raise UserError(f"--python-version {terminal.printable(options.python_version)}: expected one such as 3.12")
    for folder in (*options.tokenizer, *options.shards):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
    names = [folder.resolve().name for folder in (*options.tokenizer, *options.shards)]
    if twice := next((name for name in names if names.count(name) > 1 or name == "quickstart"), ""):
        raise UserError(f"data/{twice} would be there twice: give the folders of --tokenizer and --shards other names")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".bundle-") as temporary:
        content = Path(temporary) / "content"
        version = fill(content, options)
        name = f"hpcgpt-{version}-cp{options.python_version.replace('.', '')}-{options.arch}"
        archive = options.out / f"{name}.tar"
        unnamed = Path(temporary) / "archive.tar"
        pack(content, unnamed, name)
        unnamed.replace(archive)
    print(f"{archive}: {archive.stat().st_size / 1e6:,.0f} MB")
    print(f"copy it to the cluster, then there: tar -xf {archive.name} && sh {name}/install.sh ~/hpcgpt")
    return 0


def fill(content: Path, options: argparse.Namespace) -> str:
    """Put everything into the folder of the bundle; return hpcgpt's version."""
    wheels = content / "wheels"
    wheels.mkdir(parents=True)
    own = _build(wheels)
    print("downloading the wheels of all that it needs (torch is large)", flush=True)
    _download(wheels, own, options)
    glibc = ".".join(map(str, needed_glibc(wheels)))
    (content / "requirements.txt").write_text(requirements(wheels))
    for script in ("install.sh", "quickstart.sh"):
        shutil.copyfile(HERE / script, content / script)
    (content / "target.sh").write_text(f"arch={options.arch} python_version={options.python_version} glibc={glibc}\n")
    _run([sys.executable, "-m", "data_prep.shakespeare", "--out", str(content / "data" / "quickstart" / "text")])
    for folder in (*options.tokenizer, *options.shards):
        shutil.copytree(folder, content / "data" / folder.resolve().name)
    version = str(parse_wheel_filename(own.name)[1])
    files = {path.relative_to(content).as_posix(): path for path in sorted(content.rglob("*")) if path.is_file()}
    sums = {name: _sha256(path) for name, path in files.items()}
    manifest = {
        "hpcgpt": version, "commit": code_snapshot.commit(), "arch": options.arch, "python": options.python_version,
        "files": {name: {"bytes": files[name].stat().st_size, "sha256": digest} for name, digest in sums.items()},
    }  # fmt: skip
    (content / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    sums["manifest.json"] = _sha256(content / "manifest.json")
    (content / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return version


def requirements(wheels: Path) -> str:
    """Return the requirements file of a folder of wheels: a name, a version and a SHA-256 each."""
    lines = []
    for wheel in sorted(wheels.iterdir()):
        if wheel.suffix != ".whl":
            raise UserError(f"{wheel.name} is not a wheel: name an index of wheels with --pip=--index-url=...")
        name, version, _, _ = parse_wheel_filename(wheel.name)
        lines.append(f"{name}=={version} --hash=sha256:{_sha256(wheel)}\n")
    return "".join(lines)


def needed_glibc(wheels: Path) -> tuple[int, int]:
    """Return the oldest version of glibc on which all of these wheels run."""
    needed = (2, 0)
    for wheel in wheels.glob("*.whl"):
        versions = []
        for tag in parse_wheel_filename(wheel.name)[3]:
            found = re.match(r"manylinux_(\d+)_(\d+)_", tag.platform)
            old = _MANYLINUX.get(tag.platform.split("_")[0])
            versions += [(int(found[1]), int(found[2]))] if found else [old] if old else []
        needed = max(needed, min(versions, default=needed))
    return needed


def closure(wheels: Path, environment: Mapping[str, str]) -> tuple[set[Path], list[str]]:
    """Follow the requirements of hpcgpt's wheel, as they apply where the bundle is installed.

    `environment`: the values of markers there. Returns the wheels that are needed, and the requirements for which the
    folder has no wheel.
    """
    by_name = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in wheels.glob("*.whl")}
    needed, missing = set(), {}
    todo, seen = [("hpcgpt", "")], set()
    while todo:
        name, extra = todo.pop()
        wheel = by_name[canonicalize_name(name)]
        needed.add(wheel)
        for text in _metadata(wheel).get_all("Requires-Dist", []):
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            wanted = canonicalize_name(requirement.name)
            if wanted not in by_name:
                requirement.marker = None  # pip would evaluate it for the machine that it runs on
                missing[wanted] = str(requirement)
                continue
            for step in ((wanted, one) for one in ("", *requirement.extras)):
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
    return needed, sorted(missing.values())


def pack(content: Path, archive: Path, top: str) -> None:
    """Write a tar file of a folder below the name `top`; owners and times are left out."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(archive, "x", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(content.rglob("*")):
            tar.add(path, f"{top}/{path.relative_to(content).as_posix()}", recursive=False, filter=anonymous)


def _build(wheels: Path) -> Path:
    """Build hpcgpt's own wheel."""
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT), env={"SOURCE_DATE_EPOCH": "315532800"})
    (own,) = wheels.iterdir()
    return own


def _download(wheels: Path, own: Path, options: argparse.Namespace) -> None:
    """Download the wheels that hpcgpt's own needs, for the chosen machine and Python, and no others.

    pip evaluates markers for the machine and the Python that it runs on. What these leave out is downloaded by name.
    """
    flags = ["--only-binary", ":all:", "--constraint", str(ROOT / "constraints.txt"), "--dest", str(wheels)]
    here = (platform.machine(), f"{sys.version_info.major}.{sys.version_info.minor}")
    if (options.arch, options.python_version) != here:
        number = options.python_version.replace(".", "")
        flags += ["--implementation", "cp", "--python-version", number, "--abi", f"cp{number}", "--abi", "abi3",
                  "--abi", "none"]  # fmt: skip
        for glibc in GLIBC:
            name = f"manylinux{glibc}" if glibc == "2014" else f"manylinux_{glibc}"
            flags += ["--platform", f"{name}_{options.arch}"]
    target = environment_of(options.arch, options.python_version)
    _pip("download", *flags, *options.pip, str(own))
    needed, missing = closure(wheels, target)
    while missing:
        _pip("download", *flags, *options.pip, *missing)
        before = missing
        needed, missing = closure(wheels, target)
        if missing == before:
            raise UserError(f"pip did not download {', '.join(missing)}")
    for wheel in set(wheels.glob("*.whl")) - needed:
        wheel.unlink()


def environment_of(arch: str, python_version: str) -> dict[str, str]:
    """Return the values of markers on a Linux machine of this architecture, in CPython of this version."""
    here = {key: str(value) for key, value in default_environment().items()}
    return here | {
        "platform_machine": arch, "platform_system": "Linux", "sys_platform": "linux", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
        "python_version": python_version, "python_full_version": f"{python_version}.0",
        "implementation_version": f"{python_version}.0",
    }  # fmt: skip


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        return email.parser.Parser().parsestr(archive.read(name).decode())


def _pip(*arguments: str, env: Mapping[str, str] | None = None) -> None:
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"], env)


def _run(command: list[str], env: Mapping[str, str] | None = None) -> None:
    """Run a program; raise UserError with its last message if it fails."""
    done = subprocess.run(command, env=os.environ | (env or {}), stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:5])} ... failed: {terminal.printable(done.stderr.strip()[-2000:])}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python bundle/make_bundle.py", description="Make an archive that installs hpcgpt without a network."
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for the archive")
    parser.add_argument("--arch", choices=ARCHITECTURES, default=platform.machine(), help="of the cluster's machines")
    parser.add_argument("--python-version", default=here, metavar="3.N", help="of the cluster (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, action="append", default=[], metavar="DIR", help="a tokenizer to add")
    parser.add_argument(
        "--shards", type=Path, action="append", default=[], metavar="DIR", help="a folder of shards to add"
    )
    parser.add_argument(
        "--pip", action="append", default=[], metavar="FLAG",
        help="a flag of `pip download`, as --pip=--extra-index-url=... for torch's builds for one version of CUDA",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.run(main)

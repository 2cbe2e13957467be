"""bundle/: an archive that installs hpcgpt, and runs the quick start, where there is no network."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle import make_bundle
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED
from hpcgpt.run import run_folder
from tests.programs import ROOT
from tests.tiny_run import rows

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
MISSING = f"not-there==1.0 --hash=sha256:{hashlib.sha256(b'').hexdigest()}\n"


def made(
    folder: Path, arch: str = platform.machine(), python: str = HERE, requirements: str = "", glibc: str = "2.17"
) -> Path:
    """Make a bundle without wheels: all that install.sh reads."""
    (folder / "wheels").mkdir(parents=True)
    shutil.copyfile(ROOT / "bundle" / "install.sh", folder / "install.sh")
    (folder / "requirements.txt").write_text(requirements)
    (folder / "target.sh").write_text(f"arch={arch} python_version={python} glibc={glibc}\n")
    digest = hashlib.sha256(requirements.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  requirements.txt\n")
    return folder


def install(bundle: Path, *arguments: object, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh without a network, and without any setting of this user's or of pip's."""
    bare = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHON": sys.executable} | env
    command = ["sh", str(bundle / "install.sh"), *map(str, arguments)]
    return subprocess.run(command, env=bare, cwd=home, capture_output=True, text=True, timeout=300, check=False)


# --- before anything is installed ------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch": "s390x"}, f"this bundle is for s390x, and this machine is {platform.machine()}: make one with ARCH="),
        ({"glibc": "9.9"}, "the wheels of this bundle need glibc 9.9 or later, and this machine has glibc 2."),
        ({"python": "3.99"}, f"this bundle is for Python 3.99, and {sys.executable} is {HERE}: name another with"),
    ],
)  # fmt: skip
def test_another_machine_or_python_is_refused(changes: dict[str, str], sentence: str, tmp_path: Path) -> None:
    done = install(made(tmp_path / "bundle", **changes), "env", home=tmp_path)
    assert done.returncode == 2
    assert f"error: {sentence}" in done.stderr
    assert not (tmp_path / "env").exists()


@pytest.mark.processes
def test_a_machine_without_glibc_is_refused(tmp_path: Path) -> None:
    """As with musl, whose getconf does not know GNU_LIBC_VERSION."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "getconf").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "getconf").chmod(0o755)
    done = install(made(tmp_path / "bundle"), "env", home=tmp_path, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert done.returncode == 2
    assert "need glibc 2.17 or later, and this machine has no glibc" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("damage", [lambda path: path.write_text("x==1\n"), Path.unlink])
def test_a_damaged_or_missing_file_is_named(damage: Callable[[Path], object], tmp_path: Path) -> None:
    bundle = made(tmp_path / "bundle")
    damage(bundle / "requirements.txt")
    done = install(bundle, "env", home=tmp_path)
    assert done.returncode == 2
    assert "requirements.txt: FAILED" in done.stdout
    assert "damaged or missing: copy the bundle again" in done.stderr
    assert not (tmp_path / "env").exists()


@pytest.mark.processes
def test_an_existing_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine").write_text("x")
    done = install(made(tmp_path / "bundle"), "env", home=tmp_path)
    assert (done.returncode, (tmp_path / "env" / "mine").read_text()) == (2, "x")
    assert f"{tmp_path}/env exists: remove it, or name another folder" in done.stderr


@pytest.mark.processes
def test_without_a_folder_or_without_that_python_it_says_what_to_type(tmp_path: Path) -> None:
    bundle = made(tmp_path / "bundle")
    assert "name the folder of the new virtual environment" in install(bundle, home=tmp_path).stderr
    done = install(bundle, "env", home=tmp_path, PYTHON="python3.99")
    assert (done.returncode, "there is no python3.99: name one with PYTHON=" in done.stderr) == (2, True)


@pytest.mark.processes
def test_a_wheel_that_is_missing_is_named_and_the_new_folder_is_removed(tmp_path: Path) -> None:
    done = install(made(tmp_path / "bundle", requirements=MISSING), "env", home=tmp_path)
    assert done.returncode == 2
    assert "No matching distribution found for not-there==1.0" in done.stderr
    assert not (tmp_path / "env").exists()


@pytest.mark.processes
def test_settings_of_the_users_pip_and_python_have_no_effect(tmp_path: Path) -> None:
    settings = {
        "PIP_USER": "1",
        "PIP_CONSTRAINT": "/not/there",
        "PIP_TARGET": f"{tmp_path}/x",
        "PYTHONHOME": "/not/there",
    }
    done = install(made(tmp_path / "bundle"), tmp_path / "env", home=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "env" / "bin" / "python").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.processes
def test_an_interrupted_installation_leaves_nothing(tmp_path: Path) -> None:
    bundle = made(tmp_path / "bundle")
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    command = ["sh", str(bundle / "install.sh"), str(tmp_path / "env")]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True) as running:
        while not (tmp_path / "env").exists():
            assert running.poll() is None
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
    assert running.returncode == 130
    assert not (tmp_path / "env").exists()


# --- the archive -----------------------------------------------------------------------------------


def test_equal_content_gives_an_equal_archive(tmp_path: Path) -> None:
    digests: set[str] = set()
    for name in ("a", "b"):
        content = made(tmp_path / name)
        os.utime(content / "install.sh", (len(digests), 1000 * len(digests)))
        (content / "install.sh").chmod(0o700 if digests else 0o600)
        make_bundle.pack(content, tmp_path / f"{name}.tar", "hpcgpt-1")
        digests.add(hashlib.sha256((tmp_path / f"{name}.tar").read_bytes()).hexdigest())
    assert len(digests) == 1
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert "hpcgpt-1/install.sh" in tar.getnames()


def test_the_requirements_name_each_wheel_with_its_hash(tmp_path: Path) -> None:
    for name in ("a_b-1.0-py3-none-any.whl", "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"):
        (tmp_path / name).write_bytes(name.encode())
    assert make_bundle.requirements(tmp_path).splitlines() == [
        f"a-b==1.0 --hash=sha256:{hashlib.sha256(b'a_b-1.0-py3-none-any.whl').hexdigest()}",
        "torch==2.13.0+cpu --hash=sha256:"
        + hashlib.sha256(b"torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").hexdigest(),
    ]
    (tmp_path / "x-1.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"x-1\.tar\.gz is not a wheel"):
        make_bundle.requirements(tmp_path)


def wheel(folder: Path, name: str, *requirements: str, tags: str = "py3-none-any") -> Path:
    path = folder / f"{name}-1.0-{tags}.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        "Version: 1.0",
        *(f"Requires-Dist: {one}" for one in requirements),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def test_requirements_are_those_of_the_machine_where_the_bundle_is_installed(tmp_path: Path) -> None:
    """pip takes those of the machine that downloads."""
    wheel(tmp_path, "hpcgpt", "arm; platform_machine == 'aarch64'", "intel; platform_machine == 'x86_64'",
          "old; python_version < '3.12'", "new[fast]>=2; python_version >= '3.12'", "plain",
          "test; extra == 'test'")  # fmt: skip
    wheel(tmp_path, "plain", "more; extra == 'more'")
    for name in ("intel", "old", "unrelated"):
        wheel(tmp_path, name)
    needed, missing = make_bundle.closure(tmp_path, make_bundle.environment_of("x86_64", "3.11"))
    assert ({path.name.partition("-")[0] for path in needed}, missing) == ({"hpcgpt", "plain", "intel", "old"}, [])
    needed, missing = make_bundle.closure(tmp_path, make_bundle.environment_of("aarch64", "3.12"))
    assert ({path.name.partition("-")[0] for path in needed}, missing) == ({"hpcgpt", "plain"}, ["arm", "new[fast]>=2"])
    wheel(tmp_path, "arm")
    wheel(tmp_path, "new", "quick; extra == 'fast'")
    assert make_bundle.closure(tmp_path, make_bundle.environment_of("aarch64", "3.12"))[1] == ["quick"]


def test_the_needed_glibc_is_that_of_the_newest_wheel(tmp_path: Path) -> None:
    for name, tags in (("a", "py3-none-any"), ("b", "cp311-cp311-manylinux2014_x86_64.manylinux_2_28_x86_64")):
        wheel(tmp_path, name, tags=tags)
    assert make_bundle.needed_glibc(tmp_path) == (2, 17)
    wheel(tmp_path, "c", tags="cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64")
    assert make_bundle.needed_glibc(tmp_path) == (2, 27)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shards", "quickstart"], "data/quickstart would be there twice"),
        (["--python-version", "4"], "--python-version 4: expected one such as 3.12"),
        (["--shards", "/not/there"], "/not/there: there is no such folder"),
        (["--tokenizer", "/not/there"], "/not/there: there is no such folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_downloaded(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(UserError, match=sentence):
        make_bundle.main(["--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


# --- the whole way ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_from_a_bundle_the_quick_start_runs_without_a_network_and_from_an_empty_home(
    tmp_path: Path, shards_folder: Path
) -> None:
    """The real archive, installed by Python and pip of this machine in a network namespace without a route."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], check=False).returncode:
        pytest.skip("there are no network namespaces for this user")
    home, bundles = tmp_path / "home", tmp_path / "bundles"
    home.mkdir()
    command = [sys.executable, str(ROOT / "bundle" / "make_bundle.py"), "--out", str(bundles)]
    subprocess.run([*command, "--shards", str(shards_folder)], check=True, cwd=ROOT)
    (archive,) = bundles.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    manifest = json.loads((unpacked / "manifest.json").read_text())
    assert manifest["arch"] == platform.machine()
    assert f"data/{shards_folder.name}/manifest.json" in manifest["files"]
    # Options of the quick start, to make it short.
    short = ["--train.steps", "60", "--schedule.warmup_steps", "10", "--eval.every", "60", "--eval.batches", "4"]
    # A Python that has no packages: not the one of a virtual environment.
    base = Path(sys.base_prefix) / "bin" / f"python{HERE}"
    script = f"""
        ip link set lo up && ! ip route get 192.0.2.1 2>/dev/null &&
        PYTHON={base} sh {unpacked}/install.sh {tmp_path}/env &&
        . {tmp_path}/env/bin/activate && sh {unpacked}/quickstart.sh "$@"
    """
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    done = subprocess.run(["unshare", "-n", "sh", "-ec", script, "sh", *short], env=env, cwd=home, capture_output=True,
                          text=True, timeout=800, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(home / "runs" / "quickstart" / "metrics.jsonl")[-1]["step"] == 60
    ended = run_folder.read_exit(home / "runs" / "quickstart")
    assert ended
    assert ended.status == FINISHED
    assert "--- sample 2" in done.stdout

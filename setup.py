"""Name the packages: every folder of hpcgpt and data_prep, and slurm/. pyproject.toml can find or list, but not both.

The batch scripts stay in slurm/, where `sbatch slurm/pretrain.sbatch` is typed. In a wheel the same files are the
package hpcgpt.slurm.scripts (package-dir in pyproject.toml), so that an installation needs no checkout. An editable
one, and the source tree itself, read them in slurm/: hpcgpt/slurm/batch_scripts.py knows both places.
tests/test_wheel.py compares a wheel's files with the tracked ones.
"""

import tempfile

from setuptools import find_packages, setup

with tempfile.TemporaryDirectory() as folder:
    setup(
        packages=[*find_packages(include=["hpcgpt*", "data_prep*"]), "hpcgpt.slurm.scripts"],
        # A build/ that stayed here would give the next wheel modules that are gone by then.
        options={"build": {"build_base": folder}},
    )

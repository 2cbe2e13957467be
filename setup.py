"""Name the packages: every folder of hpcgpt and data_prep, and slurm/. pyproject.toml can find or list, but not both.

The batch scripts stay in slurm/, where `sbatch slurm/pretrain.sbatch` is typed. In a wheel the same files are the
package hpcgpt.slurm.scripts (package-dir in pyproject.toml), so that an installation needs no checkout. An editable
one, and the source tree itself, read them in slurm/: hpcgpt/slurm/batch_scripts.py knows both places.
tests/test_wheel.py compares a wheel's files with the tracked ones.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["hpcgpt*", "data_prep*"]), "hpcgpt.slurm.scripts"])

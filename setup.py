"""Name the packages: every folder of hpcgpt and data_prep, and slurm/. pyproject.toml can find or list, but not both.

The batch scripts stay in slurm/, where `sbatch slurm/pretrain.sbatch` is typed. In a wheel the same files are the
package hpcgpt.slurm.scripts (package-dir in pyproject.toml), so that an installation needs no checkout. An editable
one, and the source tree itself, read them in slurm/: hpcgpt/slurm/batch_scripts.py knows both places.
tests/test_wheel.py compares a wheel's files with the tracked ones.
"""

import tempfile
import warnings

from setuptools import find_packages, setup

# To setuptools every folder with data is a package, and it warns of those that are not named.
DATA = ("hpcgpt.config.presets", "hpcgpt.tokenizer.vocab", "hpcgpt.slurm.scripts", "hpcgpt.slurm.scripts.sites")
# A general remark of setuptools at each `pip install --editable`, which pip 26 prints.
warnings.filterwarnings("ignore", "Editable installation")

with tempfile.TemporaryDirectory() as folder:
    setup(
        packages=[*find_packages(include=["hpcgpt*", "data_prep*"]), *DATA],
        # A build/ that stayed here would give the next wheel modules that are gone by then.
        options={"build": {"build_base": folder}},
    )

#!/bin/sh
# Install hpcgpt from this bundle, without a network: sh install.sh FOLDER makes a virtual environment there.
#
# PYTHON=... chooses the Python. Every file is compared with its SHA-256 before anything is installed.
set -eu
cd "$(dirname "$0")"
fail() { echo "error: $*" >&2; exit 2; }
# Settings of this user's would install other versions, or elsewhere.
unset PYTHONPATH PYTHONHOME $(env | sed -n 's/^\(PIP_[A-Za-z_]*\)=.*/\1/p')

[ $# -eq 1 ] || fail "name the folder of the new virtual environment: sh install.sh ~/hpcgpt"
case $1 in /*) target=$1 ;; *) target=${OLDPWD:-.}/$1 ;; esac
. ./target.sh  # arch, python_version, glibc: what the wheels are for

[ "$(uname -m)" = "$arch" ] || fail "this bundle is for $arch, and this machine is $(uname -m): make one with ARCH=$(uname -m)"
python=${PYTHON:-python3}
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "there is no $python: name one with PYTHON=..."
[ "$found" = "$python_version" ] ||
    fail "this bundle is for Python $python_version, and $python is $found: name another with PYTHON=python$python_version, or make" \
        "a bundle with PYTHON_VERSION=$found"
[ ! -e "$target" ] || fail "$target exists: remove it, or name another folder"
have=$(getconf GNU_LIBC_VERSION 2>/dev/null) || have="no glibc"
case $have in glibc\ *) ;; *) fail "the wheels of this bundle need glibc $glibc or later, and this machine has $have" ;; esac
[ "$(printf '%s\n' "glibc $glibc" "$have" | sort -V | head -n 1)" = "glibc $glibc" ] ||
    fail "the wheels of this bundle need glibc $glibc or later, and this machine has $have"
echo "comparing the files with their SHA-256"
sha256sum --check --quiet SHA256SUMS || fail "the files above are damaged or missing: copy the bundle again"

echo "installing into $target"
trap 'rm -rf "$target"' EXIT  # it is ours: it did not exist
trap 'exit 130' INT
trap 'exit 143' TERM HUP
"$python" -m venv "$target" || fail "the virtual environment could not be made: see above"
PIP_CONFIG_FILE=/dev/null "$target/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-index \
    --find-links wheels --require-hashes --requirement requirements.txt ||
    fail "pip could not install the wheels: its message is above"
trap - EXIT INT TERM HUP
cat <<END
installed. To use it:
    . '$target/bin/activate'
    hpcgpt --help
    sh '$PWD/quickstart.sh'   # makes data/ and runs/ in the current folder
    hpcgpt slurm-script pretrain > pretrain.sbatch
END

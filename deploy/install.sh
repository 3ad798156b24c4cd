#!/usr/bin/env bash
# Install Edgewater into a virtual environment, with the versions of deploy/constraints.txt and a CPU build of torch.
#
#   deploy/install.sh [--editable] [--extras train,dev] [VENV]      (default: --extras train, VENV .venv)
#
# Environment:
#   PYTHON       the Python to use (3.11 or 3.12); otherwise the first of python3.12, python3.11 and python3 for
#                which a CPU build of torch is found
#   CUDA=1       take the torch that pip finds even when it brings CUDA
#   TORCH_INDEX  where to ask for CPU builds first (default: PyTorch's own index); "none" asks nowhere
#   WHEELS       a folder of wheels to look in as well, for a machine without network
set -euo pipefail
cd "$(dirname "$0")/.."

editable=() extras=train venv=.venv
while [ $# -gt 0 ]; do
  case $1 in
    --editable) editable=(--editable) ;;
    --extras) extras=$2; shift ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "install: unknown option $1; see deploy/install.sh --help" >&2; exit 2 ;;
    *) venv=$1 ;;
  esac
  shift
done
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
case ",$extras," in *,train,*) needs_torch=1 ;; *) needs_torch=0 ;; esac

say() { echo "install: $*" >&2; }
die() { say "$1"; exit 1; }

pip() {
  local verb=$1; shift
  local quiet=(--quiet)
  [ -t 2 ] && quiet=()
  "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$verb" "${quiet[@]}" \
    ${WHEELS:+--find-links "$WHEELS"} --constraint deploy/constraints.txt "$@"
}

usable() { # usable PYTHON: it runs, is 3.11 or 3.12, and can make virtual environments
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

index_answers() { # one short request; a box without network loses four seconds at most
  [ "$index" != none ] && "$1" - "$index" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=4).close()
PY
}

brings_cuda() { # brings_cuda REPORT: pip's plan names a package of the CUDA stack
  grep -qE '"name": "(nvidia|cuda|triton|pytorch-triton)' "$1"
}

failure="" # why the last Python did not do: "pip" found no torch at all, or what it found brings "cuda"

torch_is_cpu() { # In the environment as it is now: prefer the CPU index, else what pip finds if that is a CPU build.
  if index_answers "$venv/bin/python"; then
    say "torch from $index"
    pip install --no-deps --index-url "$index" torch && return 0
    say "$index has no torch for this Python; asking pip"
  fi
  local report
  report=$(mktemp)
  if ! pip install --dry-run --report "$report" torch >&2; then
    failure=pip
  elif brings_cuda "$report"; then
    failure=cuda
  else
    failure=""
  fi
  rm -f "$report"
  [ -z "$failure" ]
}

make_venv() { # make_venv PYTHON: an environment of that Python at $venv; keeps one that fits
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv exists and is no virtual environment; name another folder, or remove it"
  fi
  "$1" -m venv --clear "$venv"
}

ready() { # The environment at $venv can take the installation.
  [ "$needs_torch" = 0 ] || [ "${CUDA:-0}" = 1 ] || torch_is_cpu
}

choose() { # Leave at $venv an environment whose torch is a CPU build.
  if [ -z "${PYTHON:-}" ] && usable "$venv/bin/python" && ready; then return 0; fi
  local tried="" cuda_found="" python
  for python in ${PYTHON:-python3.12 python3.11 python3}; do
    usable "$python" || continue
    tried="$tried $python"
    make_venv "$python"
    say "$("$venv/bin/python" --version) at $(command -v "$python")"
    if ready; then return 0; fi
    [ $failure = cuda ] && cuda_found=1 && say "the torch that pip finds for $python brings CUDA"
    [ $failure = pip ] && say "pip finds no torch for $python"
  done
  if [ -z "$tried" ]; then
    die "no Python 3.11 or 3.12 that can make virtual environments (tried ${PYTHON:-python3.12, python3.11, python3});
  install one (Debian: apt-get install python3 python3-venv) or name it with PYTHON=/path/to/python3.11"
  fi
  rm -rf "$venv"
  [ -n "$cuda_found" ] || die "pip finds no torch for any of:$tried; what it says stands above. Without network, put the wheels of
  deploy/constraints.txt into a folder and name that with WHEELS=FOLDER (deploy/INSTALL.md)."
  die "the torch that pip finds brings CUDA (gigabytes that this project does not use), for each of:$tried. Either
  - let this machine reach $index, or name a mirror of it with TORCH_INDEX=URL, or
  - put a CPU wheel of torch into a folder and name that with WHEELS=FOLDER, or
  - name another Python with PYTHON=..., or
  - accept the CUDA build with CUDA=1."
}

choose
say "packages"
pip install setuptools
pip install --no-build-isolation "${editable[@]}" ".${extras:+[$extras]}"
"$venv/bin/python" -m pip check >&2 || die "the installed versions do not fit together; remove $venv and install again"
if [ "${CUDA:-0}" != 1 ] && "$venv/bin/python" -m pip --disable-pip-version-check list 2>/dev/null | grep -qE '^(nvidia|triton|cuda)'; then
  die "$venv holds CUDA packages; remove it and install again, or accept them with CUDA=1"
fi
say "done: $venv/bin/edgewater"

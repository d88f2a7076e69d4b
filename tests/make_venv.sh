#!/usr/bin/env bash
# make_venv.sh FOLDER: a virtual environment with pip, by the newest suitable python on the PATH ($PYTHON wins).
set -euo pipefail
venv=$1

if [[ -x $venv/bin/python ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found=$python
        break
    fi
done
if [[ -z ${found:-} ]]; then
    echo "No python >= 3.11 found (looked for: ${PYTHON:-python3, python3.14 ... python3.11}). Install one, or say PYTHON=/path/to/python3." >&2
    exit 2
fi

rm -rf "$venv"
if "$found" -m venv "$venv" 2>/dev/null; then
    exit 0
fi
# Debian ships python3 without ensurepip; its pip can still fill an environment.
rm -rf "$venv"
if "$found" -m venv --without-pip "$venv" && "$found" -m pip --python "$venv/bin/python" install -q pip; then
    exit 0
fi
rm -rf "$venv"
echo "\`$found -m venv\` cannot make an environment here. On Debian or Ubuntu: apt-get install python3-venv python3-pip" >&2
exit 2

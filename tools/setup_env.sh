#!/usr/bin/env bash
# Set up .venv with the versions of constraints.txt: `tools/setup_env.sh demo`, `test` or `slow`.
# What is there already stays; what was missing is tried again. `make` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:?usage: tools/setup_env.sh demo|test|slow}
commit=02b5c4e295e990042a714712c21dc79b731e8833
home=https://github.com/facebookresearch/detectron2.git
python=.venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check -q "$@"; }

if ! "$python" -c '' 2>/dev/null; then
    ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; choose one with PYTHON=/path/to/python3" >&2
        exit 1
    }
    ${PYTHON:-python3} -m venv .venv
fi

stamp=.venv/$extra-$(cat constraints.txt setup.py | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "set-up: installing the packages of constraints.txt into .venv"
    pip install -c constraints.txt pip 'setuptools<82' wheel ninja
    pip install -c constraints.txt torch torchvision
    pip install -c constraints.txt --no-build-isolation -e ".[$extra]"
    touch "$stamp"
fi
# Compiles what is missing or changed; without it everything works, more slowly. Only a failure is worth a line.
"$python" -m dino.layers.ops.build > /dev/null || true

if ! "$python" -W ignore -c 'import detectron2' 2>/dev/null; then
    if GIT_TERMINAL_PROMPT=0 timeout 60 git ls-remote "$home" HEAD >/dev/null 2>&1 </dev/null; then
        echo "set-up: building Detectron2 from $home (a minute or two)"
        # Without a visible GPU its CUDA operators are left out; DINO uses none of them.
        CUDA_VISIBLE_DEVICES='' MAX_JOBS=${MAX_JOBS:-4} GIT_TERMINAL_PROMPT=0 \
            "$python" -m pip --disable-pip-version-check -q install -c constraints.txt --no-build-isolation \
            "detectron2 @ git+$home@$commit" || {
            echo "error: Detectron2 was reached but could not be installed; the messages above say why" >&2
            exit 1
        }
    else
        echo "set-up: Detectron2 can't be installed: $home can't be reached." >&2
        echo "        The demonstration trains through tools/plain_train.py; tests that need Detectron2 are skipped." >&2
        echo "        The next run of make tries again." >&2
    fi
fi

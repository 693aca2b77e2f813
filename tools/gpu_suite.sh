#!/usr/bin/env bash
# `bash tools/gpu_suite.sh RESULTS [...]`: gpu_suite.py beside this file, with the python3 on the PATH (or $PYTHON).
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_suite.py" "$@"

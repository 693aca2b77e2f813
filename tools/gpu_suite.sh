#!/usr/bin/env bash
# Build and prove the CUDA operator on a machine with a CUDA GPU and nvcc; installs nothing, needs no network.
#
#   bash tools/gpu_suite.sh RESULTS         the folder gets a summary, and the full output of each step beside it
#
# Uses the python3 on the PATH (or $PYTHON), with torch, numpy, scipy, pytest and safetensors.
#   DINO_GOLDEN=FOLDER    golden arrays; a failure if the folder has none. Unset: their tests are left out, and the
#                         summary says so.
#   DINO_AGAINST=FOLDER   checkout of a public CUDA kernel of the original design, built in place, to be measured in the
#                         same run
#   DINO_OFFICIAL=FOLDER  checkout of the official program, for the benchmark of the whole model (with torchvision)
#   DINO_DETREX=FOLDER    checkout of detrex, for the same
# Ends with status 1 if a step failed. All steps together stay under 8 minutes: one that would not is cut off, and
# counts as failed.

set -u
results=${1:?usage: $0 RESULTS}
mkdir -p "$results"
results=$(cd "$results" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DINO_DEFORM_ATTN=auto PYTHONDONTWRITEBYTECODE=1
limit=465
failed=0
summary="$results/summary.txt"
: > "$summary"

say() { echo "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: the output goes to NAME.log, its last line to the summary
step() {
  local name=$1 seconds=$2 start=$SECONDS status log="$results/$1.log" verdict=passed
  shift 2
  ((seconds > limit - SECONDS)) && seconds=$((limit - SECONDS))
  if ((seconds < 5)); then
    say "$name: FAILED (no time left)"
    failed=1
    return 1
  fi
  timeout --kill-after=5 "$seconds" "$@" > "$log" 2>&1
  status=$?
  ((status == 124 || status == 137)) && echo "cut off after $seconds s" >> "$log"
  ((status)) && { verdict="FAILED (status $status)"; failed=1; }
  say "$name: $verdict, $((SECONDS - start)) s: $(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-200)"
  return "$status"
}

# Without the options of pyproject.toml: they name a plugin that a bare machine lacks.
tests() { step "$1" "$2" "$python" -m pytest -o addopts= -p no:cacheprovider -q -rfEs "${@:3}"; }

say "commit: $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
step device 30 "$python" -c '
import platform, torch
assert torch.cuda.is_available(), "torch sees no CUDA GPU"
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
capability = ".".join(map(str, torch.cuda.get_device_capability()))
versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
print(f"{names}, capability {capability}, {versions}")
' || exit 1

step build 180 "$python" -m dino.build || exit 1
step environment 30 env DINO_DEFORM_ATTN=compiled "$python" -m dino.env

operator_tests=(tests/layers/test_deform_attn*.py)
for file in tests/layers/test_operator*.py; do [[ -e $file ]] && operator_tests+=("$file"); done
tests operator 120 "${operator_tests[@]}" -m "not slow" -k "not stand_in and not spilled and not wide and not compiles"

sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2> /dev/null)
if [[ -n $sanitizer ]]; then
  # Each tensor gets an allocation of its own, so that reading beyond its end is seen. Only our kernels are watched,
  # where the sanitizer can tell them apart.
  only=(--kernel-regex kns=dino)
  "$sanitizer" "${only[@]}" true > "$results/sanitizer.log" 2>&1 || only=()
  small=(tests/layers/test_deform_attn_cuda.py -k "gpu and (odd_sizes or long_lists or (like_the_reference and 32))")
  for check in memcheck racecheck; do
    step "$check" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$check" "${only[@]}" \
      --error-exitcode 9 "$python" -m pytest -o addopts= -p no:cacheprovider -q "${small[@]}"
  done
else
  say "memcheck, racecheck: not run, there is no compute-sanitizer"
fi

tests network 60 -p tests.on_device tests/modeling/test_transformer.py tests/modeling/test_network.py \
  -m "not slow" -k "not published"  # that one needs torchvision
if [[ -n ${DINO_GOLDEN:-} ]]; then
  if compgen -G "$DINO_GOLDEN/01_*.safetensors" > /dev/null; then
    tests golden 90 -p tests.on_device tests/golden/test_golden_{01,03,07,11}*.py -m "not slow"
  else
    say "golden: FAILED, DINO_GOLDEN=$DINO_GOLDEN holds no golden arrays"
    failed=1
  fi
else
  say "golden: not run, DINO_GOLDEN is not set"
fi

benchmark=(benchmarks/deform_attn.py --device cuda --results "$results")
if [[ -n ${DINO_AGAINST:-} ]]; then
  benchmark+=(--against "$DINO_AGAINST")
else
  say "public kernel: not measured, DINO_AGAINST is not set"
fi
step benchmark 150 "$python" "${benchmark[@]}"

if "$python" -c "import torchvision" 2> /dev/null; then
  model=(benchmarks/model.py --device cuda --results "$results")
  others=()
  [[ -n ${DINO_OFFICIAL:-} ]] && others+=("$DINO_OFFICIAL")
  [[ -n ${DINO_DETREX:-} ]] && others+=("$DINO_DETREX")
  ((${#others[@]})) || say "other programs: not measured, neither DINO_OFFICIAL nor DINO_DETREX is set"
  for folder in "${others[@]:-}"; do
    step "model${folder:+ against ${folder##*/}}" 300 "$python" "${model[@]}" ${folder:+--against "$folder"}
  done
else
  say "model: not measured, there is no torchvision"
fi

say "$( ((failed)) && echo FAILED || echo "all passed"), $SECONDS s"
exit "$failed"

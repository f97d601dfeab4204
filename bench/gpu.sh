#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a GPU, and prints one short table.
#
#     bench/gpu.sh [--device cpu] [--out FOLDER]
#
# Without a GPU, --device cpu runs the same steps as far as a CPU goes: a rehearsal. Results go to
# FOLDER (default: bench/results/gpu), one log and one table a part; a part that fails does not stop
# the others, and the last lines say which did.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda
out=bench/results/gpu
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) echo "gpu.sh: expected --device cpu|cuda or --out FOLDER, got $1" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
failed=()

part() { # name, command...
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  if "$@" >"$out/$name.log" 2>&1; then
    echo "   $((SECONDS - start)) s"
  else
    echo "   FAILED after $((SECONDS - start)) s: see $out/$name.log"
    tail -n 15 "$out/$name.log"
    failed+=("$name")
  fi
}

if [ "$device" = cuda ]; then
  part build "$python" -m pip install --no-build-isolation --no-deps --config-settings=cmake.define.BDU_CUDA=ON --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=native -e .
  part doctor "$python" -m bdu doctor
  part tests "$python" -m pytest -q -m "gpu or not slow" tests/test_gpu.py tests/test_ops.py tests/test_small_state.py tests/test_kernels.py tests/test_optim.py tests/test_optim_contract.py tests/test_fisher.py tests/test_fisher_ops.py
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x tests/test_gpu.py -k "sanitize"
    done
  fi
  part step "$python" bench/step.py --device cuda --rounds 30 --json "$out/step.json" --markdown "$out/step.md"
  part memory "$python" bench/memory.py --json "$out/memory.json" --markdown "$out/memory.md"
  part seven_billion "$python" bench/seven_billion.py --json "$out/seven_billion.json"
  part fisher "$python" bench/fisher.py --device cuda --json "$out/fisher.json" --markdown "$out/fisher.md"
else
  part doctor "$python" -m bdu doctor
  part tests "$python" -m pytest -q tests/test_gpu.py
  part step "$python" bench/step.py --device cpu --shapes resnet18 --dtype float32 --rounds 3 --arm fused --json "$out/step.json" --markdown "$out/step.md"
  part seven_billion "$python" bench/seven_billion.py --device cpu --layers 2 --width 128 --json "$out/seven_billion.json"
  part fisher "$python" bench/fisher.py --case mlp --rounds 2 --json "$out/fisher.json" --markdown "$out/fisher.md"
fi

echo
for table in step memory fisher; do
  [ -f "$out/$table.md" ] && grep -E '^\||^Device' "$out/$table.md"
done
[ -f "$out/seven_billion.json" ] && cat "$out/seven_billion.json"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi

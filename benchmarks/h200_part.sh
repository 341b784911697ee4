# Read by h200_attention.sh and h200_experts.sh: where figures go, and how a part is run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0

part() {  # part SECONDS NAME SHAPES
  echo "== $2"
  timeout --signal=INT --kill-after=10 "$1" "$python" -m experiments.benchmark --suite=kernels --shapes="$3" \
    --output="$out/gpu_$2.json" 2>&1 | tee "$out/gpu_$2.txt" || status=1
}

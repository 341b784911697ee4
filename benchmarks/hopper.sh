#!/usr/bin/env bash
# Check, repeat and time every kernel on one H100 or H200, then nano end to end: see --helpshort.
#
#     [PYTHON=python3] benchmarks/hopper.sh [--part=check|repeat|time|nano|tune|SHAPE] [--out=FOLDER]
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m experiments.benchmark.device --chip=hopper "$@"

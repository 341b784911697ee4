#!/usr/bin/env bash
# Check and time the kernels of experts on one H100 or H200, in under ten minutes.
#
#     [OUT=folder] [PYTHON=python3] benchmarks/h200_experts.sh
#
# Needs jax with CUDA, absl-py and nothing else. First the small odd shapes, which are right or wrong
# (one token, two choices, one hot expert, idle experts, rows of nobody, int8, int4 and fp8); then
# Scout's 8192 tokens, forward and backward, beside dense products of as many FLOPs and XLA's
# ragged_dot; then decoding with 1 to 64 tokens, whose time goes by the matrices of the experts that
# are hit. To expect: at least 0.8 of the speed of the dense products forward and 0.7 backward (last
# column), decoding in bfloat16 at 0.8 of the rate of a copy (of copy), with int4 matrices at 0.6.
# Each part writes its figures, with device, date, version of jax and shapes, when it is done, so
# that a part that is cut short takes no other with it. The status is 1 if any part has a fault.
. "$(dirname "$0")/h200_part.sh"

part 150 odd_experts odd_experts,odd_experts_1,odd_experts_hot,odd_experts_empty,odd_experts_nobody,\
odd_experts_f32,odd_experts_int8,odd_experts_int4,odd_experts_fp8
part 130 experts scout_experts_8k,scout_experts_4k_top2
part 160 experts_decode scout_experts_1,scout_experts_8,scout_experts_64,scout_experts_64_int4,\
scout_experts_1_int4,scout_experts_64_int8,scout_experts_64_fp8
part 120 experts_rest scout_experts_8k_hot,scout_experts_8k_int4,scout_experts_8k_int8,\
scout_experts_8k_fp8,maverick_experts_1,maverick_experts_64,nano_experts_2k,nano_experts_1
exit $status

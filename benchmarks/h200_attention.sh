#!/usr/bin/env bash
# Check and time every attention kernel on one H100 or H200, in under ten minutes.
#
#     [OUT=folder] [PYTHON=python3] benchmarks/h200_attention.sh
#
# Needs jax with CUDA, absl-py and nothing else. First the small odd shapes, which are right or wrong
# (padding, packed rows, all head dimensions, gradients, pages, int8 and fp8); then long attention
# beside cuDNN's, forward and backward; then decoding from 128k to 10M tokens beside the rate of a
# copy. To expect: at least 0.9 of cuDNN's speed forward and 0.8 backward (last column), decoding at
# 0.8 of the rate of a copy or more (of copy). Each part writes its figures, with device, date,
# version of jax and shapes, when it is done, so that a part that is cut short takes no other with
# it. The status is 1 if any part has a fault.
. "$(dirname "$0")/h200_part.sh"

part 130 odd odd_88,odd_packed,odd_256,odd_decode,odd_decode_fp8,odd_decode_int8
part 150 chunked scout_chunk_32k,scout_chunk_8k
part 170 decode scout_decode_128k,scout_decode_1m,scout_decode_10m,scout_decode_8k_b16,\
scout_decode_1m_int8,scout_decode_1m_fp8,scout_decode_1m_verify,scout_decode_1m_paged
part 120 rest scout_nope_32k,packed_8k,vision,nano_chunk,nano_nope,nano_decode
exit $status

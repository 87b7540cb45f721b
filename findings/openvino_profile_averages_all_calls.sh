#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU plugin, a model compiled with PERF_COUNT, InferRequest.get_profiling_info() after each inference.
#
# One would guess: the times of the nodes are those of the last inference of this request. There is one list a request, and
# it is read after infer().
#
# What really happens: every time is the mean over all inferences of the compiled model so far, also of those with other
# sizes and of other requests.
#
# Who meets it: whoever profiles how a language model writes tokens. A prompt comes first, and its long products stay in the
# mean: after a prompt of 512 tokens and 4 single ones, the profile of the last token shows a multiple of the time that the
# whole call took. A window of calls is (mean after n calls * n - mean after m calls * m) / (n - m).
#
# Seen on an AMD EPYC, two cores, with other programs running:
#   one row after 4 like it: took 3.89 ms, profile 4.62 ms
#   one row after 512 rows, each call a request of its own: took 3.87 ms, profile 35.49 ms
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet openvino==2026.4.1 numpy
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import sys
import time

import numpy as np
import openvino as ov
from openvino import opset13 as o

rng = np.random.default_rng(0)
SIZE, PROMPT, TOKENS = 1024, 512, 4
x = y = o.parameter([-1, SIZE], np.float32)
for _ in range(4):
    weight = o.constant(rng.standard_normal((SIZE, SIZE)).astype(np.float32) / 32)
    y = o.relu(o.matmul(y, weight, False, True))
graph = ov.Model([o.result(y)], [x])
prompt, token = (rng.standard_normal((rows, SIZE)).astype(np.float32) for rows in (PROMPT, 1))


def call(request, given):
    """Milliseconds of an inference, and the sum of the times that its profile shows."""
    began = time.perf_counter()
    request.infer([given])
    took = time.perf_counter() - began
    return 1e3 * took, sum(1e3 * node.real_time.total_seconds() for node in request.get_profiling_info())


def after(*calls):
    """The last of several calls of a newly compiled model."""
    model = ov.Core().compile_model(graph, "CPU", {"PERF_COUNT": True})
    return [call(model.create_infer_request(), given) for given in calls][-1]


alone, late = after(*[token] * (1 + TOKENS)), after(prompt, *[token] * TOKENS)
print("openvino", ov.__version__)
print(f"one row after {TOKENS} like it: took {alone[0]:.2f} ms, profile {alone[1]:.2f} ms")
print(f"one row after {PROMPT} rows, each call a request of its own: took {late[0]:.2f} ms, profile {late[1]:.2f} ms")
same = late[1] > 1.5 * late[0] and late[1] > 2 * alone[1]
print("behaves as described" if same else "the behaviour has changed")
sys.exit(not same)
PYTHON

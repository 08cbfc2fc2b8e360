"""Asks MLServer over gRPC with raw tensors; runs in MLServer's environment, which has its messages.

``python mlserver_grpc_client.py PORT FILE SHAPE``: FILE holds the tensor's bytes, SHAPE is JSON. For each line with a number it
asks that often and prints a JSON line: the milliseconds of each request, and the last answer.
"""

import json
import struct
import sys
import time
from pathlib import Path

import grpc
from mlserver.grpc.dataplane_pb2 import ModelInferRequest
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub

port, path, shape = sys.argv[1:]
tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=json.loads(shape))
request = ModelInferRequest(model_name="gas", inputs=[tensor], raw_input_contents=[Path(path).read_bytes()])
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    infer = GRPCInferenceServiceStub(channel).ModelInfer
    for line in sys.stdin:
        took = []
        for _ in range(int(line)):
            begin = time.perf_counter_ns()
            answer = infer(request)
            took.append((time.perf_counter_ns() - begin) / 1e6)
        raw = answer.raw_output_contents
        values = struct.unpack(f"<{len(raw[0]) // 4}f", raw[0]) if raw else answer.outputs[0].contents.fp32_contents
        print(json.dumps({"took": took, "answer": list(values)}), flush=True)

"""The least that Python's gRPC can do: reads a request and sends its inputs back as outputs.

python -m benchmarks.bare_server 127.0.0.1:8001
"""

import asyncio
import sys

import grpc

from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as rpc


class Identity(rpc.GRPCInferenceServiceServicer):
    async def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=True)

    async def ModelInfer(self, request, context):
        response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        for tensor in request.inputs:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.extend(request.raw_input_contents)
        return response


async def serve(address: str) -> None:
    server = grpc.aio.server()
    rpc.add_GRPCInferenceServiceServicer_to_server(Identity(), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))

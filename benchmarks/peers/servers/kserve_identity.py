"""The identity model behind the model server of `kserve`, which runs this in its own environment.

python kserve_identity.py MODEL GRPC_PORT HTTP_PORT
"""

import sys

from kserve import InferOutput, InferResponse, Model, ModelServer


class Identity(Model):
    def __init__(self, name):
        super().__init__(name)
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        outputs = []
        for tensor in payload.inputs:
            output = InferOutput(tensor.name, list(tensor.shape), tensor.datatype)
            output.set_data_from_numpy(tensor.as_numpy(), binary_data=True)
            outputs.append(output)
        return InferResponse(payload.id, self.name, outputs)


if __name__ == "__main__":
    name, grpc_port, http_port = sys.argv[1:]
    server = ModelServer(
        grpc_port=int(grpc_port), http_port=int(http_port), enable_latency_logging=False
    )
    server.start([Identity(name)])

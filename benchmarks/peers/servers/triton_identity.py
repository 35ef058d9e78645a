"""The identity model for Triton's Python backend, which runs this with Debian's Python."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [
            triton.InferenceResponse(
                [triton.Tensor(tensor.name(), tensor.as_numpy()) for tensor in request.inputs()]
            )
            for request in requests
        ]

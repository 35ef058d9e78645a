"""The messages of the Open Inference Protocol, and tensors as it carries them."""

from aqt_protos._pool import POOL as POOL
from aqt_protos.generated import open_inference_pb2 as open_inference_pb2
from aqt_protos.generated import open_inference_pb2_grpc as open_inference_pb2_grpc

SERVICE_NAME = "inference.GRPCInferenceService"
"""The service's full name, as it stands in the path of each call and in health checks."""

__all__ = ["POOL", "SERVICE_NAME", "open_inference_pb2", "open_inference_pb2_grpc"]

"""The descriptor pool that our messages live in.

It is not protobuf's default pool: `tritonclient` registers its own files of package `inference`
there, and a pool holds a name once. The health and reflection services are added so that a
reflection server given this pool can describe all that it serves.
"""

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

POOL = DescriptorPool()
for _file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
    POOL.AddSerializedFile(_file.serialized_pb)

"""A gRPC server that answers bit for bit what was trained."""

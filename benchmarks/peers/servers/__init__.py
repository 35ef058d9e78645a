"""Other servers of the Open Inference Protocol with an identity model, to serve beside ours."""

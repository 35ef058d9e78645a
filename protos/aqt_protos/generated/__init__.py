"""Written by `protos/generate.py`; not to be edited."""

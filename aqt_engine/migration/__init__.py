"""Weights that other libraries have quantized become ours.

Values and scales are moved, never computed again: what is served are the very integers that were
stored. What comes of it is read by a model in SERVE, and `convert.Stored` makes a bundle of that.
"""

from aqt_engine.migration.aqtp import from_aqtp as from_aqtp
from aqt_engine.migration.expected import MigrationError as MigrationError
from aqt_engine.migration.qwix import from_qwix as from_qwix

"""How much of a fault is tried: little in the suite, and much by `make faults`."""

import os

LONG = os.environ.get("AQT_FAULTS") == "long"


def amount(short, long):
    """`short` in the suite, `long` where all is tried."""
    return long if LONG else short

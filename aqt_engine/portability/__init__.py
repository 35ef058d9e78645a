"""Whether a model's bits are the same on every platform, and if not, which operation's are not."""

from aqt_engine.portability.analysis import Finding as Finding
from aqt_engine.portability.analysis import findings as findings

__all__ = ["Finding", "findings"]

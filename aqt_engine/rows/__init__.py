"""Which operations of a model mix the rows of a batch, so that it cannot be served exactly.

`mixing` says so from the program alone, where that is sure. `first_mixing` finds by trial which
operation it is where it is not. `counting` says whether answers depend on how many rows there are.
"""

from aqt_engine.rows.analysis import Mixing as Mixing
from aqt_engine.rows.analysis import mixing as mixing
from aqt_engine.rows.counting import counting as counting
from aqt_engine.rows.states import Op as Op
from aqt_engine.rows.trial import first_mixing as first_mixing

__all__ = ["Mixing", "Op", "counting", "first_mixing", "mixing"]

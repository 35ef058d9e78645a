"""What quantization does to a model: error by contraction, sensitivity, mixed precision."""

from aqt_engine.analysis.observation import Contraction as Contraction
from aqt_engine.analysis.observation import observe as observe
from aqt_engine.analysis.search import BudgetError as BudgetError
from aqt_engine.analysis.search import Mixture as Mixture
from aqt_engine.analysis.search import ScoreBudget as ScoreBudget
from aqt_engine.analysis.search import SizeBudget as SizeBudget
from aqt_engine.analysis.search import search as search
from aqt_engine.analysis.sensitivity import Evaluator as Evaluator
from aqt_engine.analysis.sensitivity import Quality as Quality
from aqt_engine.analysis.sensitivity import Score as Score
from aqt_engine.analysis.sensitivity import Sensitivity as Sensitivity
from aqt_engine.analysis.sensitivity import accuracy as accuracy
from aqt_engine.analysis.sensitivity import sensitivities as sensitivities

__all__ = [
    "BudgetError",
    "Contraction",
    "Evaluator",
    "Mixture",
    "Quality",
    "Score",
    "ScoreBudget",
    "Sensitivity",
    "SizeBudget",
    "accuracy",
    "observe",
    "search",
    "sensitivities",
]

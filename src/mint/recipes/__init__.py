"""Programs on the public API, and what they measure with."""

from mint.recipes.evaluation import Evaluation, EvaluationSet, evaluation_set, mean_nll, measure

__all__ = ["Evaluation", "EvaluationSet", "evaluation_set", "mean_nll", "measure"]

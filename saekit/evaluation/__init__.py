"""Evaluation: one file per tier, on held-out text, every number with its definition, sample and interval.

runner.py decides what is measured, reconstruction.py is tier 1, language_model.py tier 2, metrics.py a number with its
interval, report.py `evaluation.json`.
"""

from importlib import import_module

_HOME = {"Evaluation": "report", "evaluate": "runner", "load_evaluation": "report"}
__all__ = ["Evaluation", "evaluate", "load_evaluation"]


def __getattr__(name: str):
    # Late, because reading a stored evaluation needs no torch and making one does.
    if name in _HOME:
        return getattr(import_module(f"saekit.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

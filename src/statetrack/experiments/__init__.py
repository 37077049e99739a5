"""Experiments: grids of runs in plain TOML files beside this one, and what runs them on all cores."""

from statetrack.experiments.experiment import Experiment, ExperimentRun, Publication, list_experiments, load_experiment
from statetrack.experiments.runner import RunEvent, run_experiment

__all__ = [
    "Experiment",
    "ExperimentRun",
    "Publication",
    "RunEvent",
    "list_experiments",
    "load_experiment",
    "run_experiment",
]

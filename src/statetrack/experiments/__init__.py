"""Experiments: grids of runs in plain TOML files beside this one, and what runs them on all cores."""

from statetrack.experiments.experiment import Experiment, ExperimentRun, load_experiment
from statetrack.experiments.runner import RunEvent, run_experiment

__all__ = ["Experiment", "ExperimentRun", "RunEvent", "load_experiment", "run_experiment"]

"""Linear RNNs that track state: eigenvalue ranges from [0, 1] to [-1, 1] for every model, on CPU and GPU."""

from statetrack.mixers import Mixer, MixerConfig, mixer_config, mixer_configs
from statetrack.mixers.deltanet import DeltaNet, DeltaNetConfig, DeltaProductConfig, GatedDeltaNetConfig
from statetrack.mixers.gla import GLA, GLAConfig
from statetrack.mixers.mamba import Mamba, MambaConfig
from statetrack.mixers.mamba2 import Mamba2, Mamba2Config
from statetrack.mixers.mlstm import MLSTM, MLSTMConfig
from statetrack.mixers.retnet import RetNet, RetNetConfig
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops import available_backends, linear_recurrence
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank, Transition

__version__ = "0.1.0"

__all__ = [
    "GLA",
    "MLSTM",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaProductConfig",
    "Diagonal",
    "Discretized",
    "EigenvalueRange",
    "GLAConfig",
    "GatedDeltaNetConfig",
    "Householder",
    "LanguageModel",
    "LowRank",
    "MLSTMConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "ModelConfig",
    "RetNet",
    "RetNetConfig",
    "Transition",
    "available_backends",
    "linear_recurrence",
    "mixer_config",
    "mixer_configs",
]

"""Linear RNNs that track state: eigenvalue ranges from [0, 1] to [-1, 1] for every model, on CPU and GPU."""

import statetrack.interruption  # noqa: F401 (before anything that takes long to import)
from statetrack.mixers import Mixer, MixerConfig, mixer_config, mixer_configs
from statetrack.mixers.attention import Attention, AttentionConfig
from statetrack.mixers.deltanet import (
    DeltaNet,
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
    KimiDeltaAttentionConfig,
)
from statetrack.mixers.gla import GLA, GLAConfig
from statetrack.mixers.homogeneous_deltaproduct import HomogeneousDeltaProduct, HomogeneousDeltaProductConfig
from statetrack.mixers.lstm import LSTM, LSTMConfig
from statetrack.mixers.mamba import Mamba, MambaConfig
from statetrack.mixers.mamba2 import Mamba2, Mamba2Config
from statetrack.mixers.mlstm import MLSTM, MLSTMConfig
from statetrack.mixers.retnet import RetNet, RetNetConfig
from statetrack.mixers.rwkv6 import RWKV6, RWKV6Config
from statetrack.mixers.rwkv7 import RWKV7, RWKV7Config
from statetrack.mixers.slstm import SLSTM, SLSTMConfig
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops import available_backends, linear_recurrence
from statetrack.pretrained import from_pretrained
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, LowRank, Transition

__version__ = "0.1.0"

__all__ = [
    "GLA",
    "LSTM",
    "MLSTM",
    "RWKV6",
    "RWKV7",
    "SLSTM",
    "Attention",
    "AttentionConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaProductConfig",
    "Diagonal",
    "Discretized",
    "EigenvalueRange",
    "GLAConfig",
    "GatedDeltaNetConfig",
    "GatedDeltaProductConfig",
    "HomogeneousDeltaProduct",
    "HomogeneousDeltaProductConfig",
    "Householder",
    "KimiDeltaAttentionConfig",
    "LSTMConfig",
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
    "RWKV6Config",
    "RWKV7Config",
    "RetNet",
    "RetNetConfig",
    "SLSTMConfig",
    "Transition",
    "available_backends",
    "from_pretrained",
    "linear_recurrence",
    "mixer_config",
    "mixer_configs",
]

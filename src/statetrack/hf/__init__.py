"""Every mixer and hybrid as a citizen of transformers: its Auto classes, `generate`, `Trainer`, its files, remote code.

Importing this package registers the model type `statetrack` with `AutoConfig` and `AutoModelForCausalLM`.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "statetrack.hf needs transformers, which comes with: pip install 'statetrack[hf]'", name="transformers"
    ) from None

from transformers import AutoConfig, AutoModelForCausalLM

from statetrack.hf.exporting import export
from statetrack.hf.modeling import StateCache, StatetrackConfig, StatetrackForCausalLM

__all__ = ["StateCache", "StatetrackConfig", "StatetrackForCausalLM", "export"]

AutoConfig.register(StatetrackConfig.model_type, StatetrackConfig)
AutoModelForCausalLM.register(StatetrackConfig, StatetrackForCausalLM)

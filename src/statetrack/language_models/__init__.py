"""Language models judged: perplexity on held-out text by length and position, state-tracking probes in words, and what
generated text costs.

A model is a directory: a run of `statetrack pretrain`, one that `statetrack.hf` has saved, a checkpoint that
`from_pretrained` reads, or any causal language model of transformers, so that a Transformer can stand beside ours.
"""

from statetrack.language_models.causal import CausalModel, load_causal_model
from statetrack.language_models.generation_costs import GenerationCost, generation_costs
from statetrack.language_models.held_out import DomainPerplexity, perplexity
from statetrack.language_models.probes import ProbeResult, evaluate_probes, list_probes, write_lm_eval_tasks

__all__ = [
    "CausalModel",
    "DomainPerplexity",
    "GenerationCost",
    "ProbeResult",
    "evaluate_probes",
    "generation_costs",
    "list_probes",
    "load_causal_model",
    "perplexity",
    "write_lm_eval_tasks",
]

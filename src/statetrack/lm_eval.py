"""`python -m statetrack.lm_eval ...`: lm-eval, which knows the models of `statetrack.hf`; the arguments are lm-eval's.

For example, after `statetrack probes --out DIR`:

    python -m statetrack.lm_eval --model hf --model_args pretrained=RUN/model,add_bos_token=True,max_length=131072
        --include_path DIR --tasks statetrack_probes

`add_bos_token` puts the separator in front, as it stands in front of every document in training; without `max_length`
lm-eval cuts texts to 2,048 tokens.
"""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> int:
    """Runs lm-eval on the arguments of this process; returns the exit status."""
    try:
        import statetrack.hf  # noqa: F401 (registers the model type)
    except ModuleNotFoundError as error:
        print(f"statetrack: {error}", file=sys.stderr)
        return 2
    try:
        harness = import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print("statetrack: lm-eval is missing, which comes with: pip install 'statetrack[evaluation]'", file=sys.stderr)
        return 2
    harness.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())

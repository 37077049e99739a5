"""`python -m statetrack`, and so `torchrun -m statetrack`: the commands."""

import sys

from statetrack.cli import main

if __name__ == "__main__":
    sys.exit(main())

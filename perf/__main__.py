"""`python -m tilelab.perf`: the commands of perf, as `python -m tilelab` has them."""

import sys

from tilelab.__main__ import main

if __name__ == "__main__":
    sys.exit(main())

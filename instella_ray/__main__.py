"""``python -m instella_ray``: the same as ``instella-ray``, where that is not on the PATH."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

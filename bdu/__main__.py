"""``python -m bdu``: the command ``bdu``."""

import sys

from bdu.cli import main

sys.exit(main())

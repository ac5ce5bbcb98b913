"""``python -m megatron_curr`` is ``megatron-curr``."""

import sys

from megatron_curr.cli import main

sys.exit(main())

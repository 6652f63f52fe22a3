"""`python -m qwen_quant.cli`."""

import sys

from qwen_quant.cli import main

sys.exit(main())

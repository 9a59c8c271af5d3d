"""`python -m agentstate` is the command `agentstate`."""

from __future__ import annotations

import sys

from agentstate.cli import main

sys.exit(main())

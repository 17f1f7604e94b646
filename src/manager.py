"""The name `manager` of the installed module `panguard_manager`."""

import sys

import panguard_manager
from panguard_manager import *  # noqa: F403 - for type checkers

if __name__ == "__main__":
    sys.exit(panguard_manager.main())
sys.modules[__name__] = panguard_manager

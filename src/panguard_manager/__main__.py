"""`python -m panguard_manager`."""

import sys

from panguard_manager import main

sys.exit(main())

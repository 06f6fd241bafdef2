"""`python -m dscoder` is the command `dscoder`."""

import sys

from dscoder.cli.main import main

sys.exit(main())

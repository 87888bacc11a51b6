import sys

from effnet_kernels.cli import main

sys.exit(main())

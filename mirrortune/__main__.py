# SPDX-License-Identifier: Apache-2.0
"""Run the command line by ``python -m mirrortune`` or ``accelerate launch -m mirrortune``."""

from mirrortune.cli.app import main

if __name__ == "__main__":
    main()

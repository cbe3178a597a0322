# SPDX-License-Identifier: Apache-2.0
"""``python -m mirrortune``, which is also what ``accelerate launch -m mirrortune`` runs."""

from mirrortune.cli.app import main

if __name__ == "__main__":
    main()

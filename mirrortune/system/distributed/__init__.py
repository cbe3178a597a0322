# SPDX-License-Identifier: Apache-2.0
"""Several processes: launched, in step, sharded."""

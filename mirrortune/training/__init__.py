# SPDX-License-Identifier: Apache-2.0
"""The training loop: step, evaluate, save, stop."""

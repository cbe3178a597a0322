# SPDX-License-Identifier: Apache-2.0
"""The training loop: step, evaluate, save, stop."""

__all__ = ["calibration", "evaluate", "optim", "settings", "tracking", "trainer"]

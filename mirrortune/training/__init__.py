# SPDX-License-Identifier: Apache-2.0
"""Run the training loop: step, evaluate, save, stop."""

__all__ = ["calibration", "evaluate", "lr_sweep", "optim", "samples", "settings", "tracking", "trainer"]

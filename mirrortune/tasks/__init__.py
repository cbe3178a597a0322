# SPDX-License-Identifier: Apache-2.0
"""What kinds of task share: columns, encoding, loss, answers, metrics."""

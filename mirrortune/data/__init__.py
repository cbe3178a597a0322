# SPDX-License-Identifier: Apache-2.0
"""From a place to rows, and from rows to batches."""

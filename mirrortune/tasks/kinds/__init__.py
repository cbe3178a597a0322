# SPDX-License-Identifier: Apache-2.0
"""The kinds of task, one file each, named like the kind."""

# SPDX-License-Identifier: Apache-2.0
"""The mathematics: factors, pairings, cores and the layer that holds them. Knows no file, no task and no model
family.
"""

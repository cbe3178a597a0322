# SPDX-License-Identifier: Apache-2.0
"""What happened to a weight, read from its singular value decompositions before and after. Mathematics only: knows no
file and no model.
"""

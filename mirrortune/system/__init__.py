# SPDX-License-Identifier: Apache-2.0
"""What the machine and the Hub give: whole files, caches, devices, processes, the console."""

# SPDX-License-Identifier: Apache-2.0
"""What files hold: tables, images, recordings, folders of classes."""

__all__ = ["arrow", "audio", "images", "media", "row_places"]

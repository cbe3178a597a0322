# SPDX-License-Identifier: Apache-2.0
"""Read files of rows: tables, images, recordings, folders of classes."""

__all__ = ["arrow", "audio", "images", "media", "row_places"]

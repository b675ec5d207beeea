"""Builders of stores: from documents or images to parts, and from parts to the arrays of a version."""

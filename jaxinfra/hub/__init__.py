"""Models in the format of Hugging Face: opened, read onto a mesh, and written."""

from jaxinfra.hub.published_model import published

__all__ = ["published"]

"""KameleonDB's own classes on this engine: :func:`install` puts it in, :func:`uninstall` takes it out."""

from .installation import EmbeddingsOffError, embeddings_on, install, installed, uninstall
from .patching import needed

__all__ = ["EmbeddingsOffError", "embeddings_on", "install", "installed", "needed", "uninstall"]

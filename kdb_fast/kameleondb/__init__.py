"""KameleonDB's own classes on this engine: :func:`install` puts it in, :func:`uninstall` takes it out."""

from .installation import EmbeddingsOffError, embeddings_on, install, installed, needed, uninstall

__all__ = ["EmbeddingsOffError", "embeddings_on", "install", "installed", "needed", "uninstall"]

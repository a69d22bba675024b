"""OpenAI's embeddings API, and servers that speak it: :mod:`.provider` is the provider, :mod:`.client` the client."""

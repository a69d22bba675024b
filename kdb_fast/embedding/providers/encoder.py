"""A provider behind the interface of an encoder, as the engines use one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ProviderInputError, UsageError
from ..encoder import Matrix, Tally
from .base import EmbeddingProvider
from .custom import adapted


class ProviderEncoder:
    """A provider as the engines use an :class:`~kdb_fast.embedding.encoder.Encoder`.

    Attributes:
        dimensions: Length of a vector.
        max_tokens: Tokens of a text beyond which the provider reads nothing.
    """

    def __init__(self, provider: EmbeddingProvider) -> None:
        self.provider = adapted(provider)
        self.dimensions = int(self.provider.dimensions)
        self.max_tokens = int(self.provider.max_tokens)

    def encode(self, texts: Sequence[str], out: Matrix) -> Tally:
        """Embed ``texts`` into ``out`` (float32, len(texts) × dimensions), row for row.

        Raises:
            ProviderInputError: Texts were refused; all other rows of ``out`` hold their vectors.
            KdbFastError: The provider cannot be used; ``out`` may be filled in part.
        """
        tally, refused = self.encode_each(texts, out)
        if refused:
            raise ProviderInputError.of(refused)
        return tally

    def encode_each(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        """:meth:`encode`, but refused rows are returned with the reason instead of raised; they are zero in ``out``.

        Nothing is embedded twice on their account, which counts where every text is paid for.
        """
        if out.shape != (len(texts), self.dimensions) or out.dtype != np.float32:
            raise UsageError(
                f"The matrix is {out.dtype} of {out.shape}; expected float32 of {(len(texts), self.dimensions)}."
            )
        return self.provider.embed_into(texts, out)

    def self_test(self) -> None:
        """Embed a probe. Raises KdbFastError if that fails, or gives no direction of the promised length."""
        self.provider.self_test()

"""Loads a codec by its recipe: the one place that knows which codecs there are."""

from __future__ import annotations

from declaim.engine.codec.base import Codec, CodecRecipe
from declaim.engine.memory import bound_primitive_cache


def load_codec(recipe: CodecRecipe, *, with_encoder: bool = False) -> Codec:
    """Load a codec from its folder; `with_encoder` also loads what encodes reference audio.

    Raises: ModelLoadError.
    """
    bound_primitive_cache()
    if recipe.kind == "dac":
        from declaim.engine.codec.dac import DacCodec

        return DacCodec.load(recipe, with_encoder=with_encoder)
    from declaim.engine.codec.lark import LarkCodec

    return LarkCodec.load(recipe, with_encoder=with_encoder)

"""Write CLIP's tokenizer as a `tokenizer.json`, the file of the Rust library `tokenizers`, which needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from distilclip.errors import InputError
from distilclip.export.parity_inputs import CAPTIONS
from distilclip.models.clip import Clip

_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_STRAIGHT = {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"'}  # noqa: RUF001


def require_clip_tokenizer(clip: Clip) -> open_clip.SimpleTokenizer:
    """Return the model's tokenizer. Raises `InputError` unless it is CLIP's byte-pair encoding of lower-cased text."""
    tokenizer: Any = clip.tokenizer
    plain = isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.reduction_fn is None
    if not plain or tokenizer.clean_fn("A  B.") != "a b.":
        raise InputError(
            f"{clip.name}: its tokenizer ({type(tokenizer).__name__}) is not CLIP's own byte-pair encoding, the only "
            "one that can be written without torch. Export an open_clip folder (--what open_clip)."
        )
    return tokenizer


def build_tokenizer(clip: Clip) -> Tokenizer:
    """Build CLIP's tokenizer with the model's context: captions are cut to it or padded with 0, as in open_clip.

    open_clip also repairs mis-decoded text (ftfy) and HTML entities; of that only quotation marks and Unicode's
    normal form are done here.

    Raises:
        InputError: the model has another tokenizer, or one that this does not reproduce.
    """
    source = require_clip_tokenizer(clip)
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocab=source.encoder, merges=merges, end_of_word_suffix="</w>"))
    straighten = [normalizers.Replace(curled, straight) for curled, straight in _STRAIGHT.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *straighten, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = (source.decoder[number] for number in (source.sot_token_id, source.eot_token_id))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, source.sot_token_id), (end, source.eot_token_id)]
    )
    tokenizer.enable_truncation(clip.context_length)
    tokenizer.enable_padding(pad_id=0, pad_token=source.decoder[0], length=clip.context_length)
    wrong = [CAPTIONS[i] for i in find_differences(tokenizer, clip, CAPTIONS)]
    if wrong:
        raise InputError(f"{clip.name}: its tokenizer reads {wrong[0]!r} otherwise than CLIP's; it cannot be written.")
    return tokenizer


def find_differences(tokenizer: Tokenizer, clip: Clip, captions: Sequence[str]) -> list[int]:
    """Return which captions the written tokenizer and the model's own read differently."""
    own = clip.tokenizer(list(captions)).tolist()
    return [i for i, found in enumerate(tokenizer.encode_batch(list(captions))) if found.ids != own[i]]

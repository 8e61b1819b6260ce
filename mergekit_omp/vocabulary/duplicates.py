"""Tokens that the output tokenizer never writes, because it has another one for the same bytes.

SentencePiece vocabularies have a digit twice, as ``5`` and as ``<0x35>``, and write only the first. Where the model
has one token for it, both would get that token's row, and two equal rows in an LM head halve a probability: one bit
lost for every digit, space and line end. So the one that is never written gets no row of the model's, like a token
that is kept free for later use.
"""

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.matching import MatchReason, VocabularyMatch
from mergekit_omp.vocabulary.segmentation import text_encoder, text_of
from mergekit_omp.vocabulary.tokens import Vocabulary


def without_duplicates(
    match: VocabularyMatch, output: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> VocabularyMatch:
    """Take the row from tokens that the tokenizer never writes, where another token that it does write has the row.

    The tokenizer itself decides: of tokens with one row, those go that it does not choose for their own text. Where it
    chooses none of them, or their bytes are no text by themselves, all stay.

    Args:
        match: the output vocabulary's match with a model.
        output: the output vocabulary.
        tokenizer: the output tokenizer.
    """
    ids = match.is_text().nonzero().flatten()
    _, group, sizes = torch.unique(match.rows[ids], return_inverse=True, return_counts=True)
    shared = ids[sizes[group] > 1].tolist()
    texts = {id_: text for id_ in shared if (text := text_of(output.tokens[id_].data)) is not None}
    written = dict(zip(texts, text_encoder(tokenizer, output)(list(texts.values())), strict=True))
    silent = [id_ for id_, chosen in written.items() if _is_another(chosen, id_, match)]
    return match.without(torch.tensor(silent, dtype=torch.int64), MatchReason.DUPLICATE)


def _is_another(chosen: list[int], id_: int, match: VocabularyMatch) -> bool:
    """Whether the tokenizer chose one token, another than ``id_``, and one that has the same row."""
    return len(chosen) == 1 and chosen[0] != id_ and bool(match.rows[chosen[0]] == match.rows[id_])

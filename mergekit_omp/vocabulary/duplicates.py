"""Find tokens that the output tokenizer never writes because it has another token with the same bytes.

SentencePiece vocabularies contain a digit twice, as ``5`` and as ``<0x35>``, and write only the first. If the model
has one token for it, both would get that token's row, and two equal rows in an LM head halve a probability: one bit is
lost for every digit, space and line end. So the token that is never written gets no row of the model, like an unused
token.
"""

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.matching import MatchReason, VocabularyMatch
from mergekit_omp.vocabulary.segmentation import text_encoder, text_of
from mergekit_omp.vocabulary.tokens import Vocabulary


def without_duplicates(
    match: VocabularyMatch, output: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> VocabularyMatch:
    """Remove the rows of tokens that the tokenizer never writes, where a token that it writes has the same row.

    The tokenizer decides: among tokens with the same row, those that it does not choose for their own text lose it. If
    it chooses none of them, or their bytes are not valid UTF-8, all keep it.

    Args:
        match: match of the output vocabulary with a model.
        output: the output vocabulary.
        tokenizer: the output tokenizer.

    Returns:
        The match in which these tokens have no row, for the reason ``DUPLICATE``.
    """
    ids = match.is_text().nonzero().flatten()
    _, group, sizes = torch.unique(match.rows[ids], return_inverse=True, return_counts=True)
    shared = ids[sizes[group] > 1].tolist()
    texts = {id_: text for id_ in shared if (text := text_of(output.tokens[id_].data)) is not None}
    written = dict(zip(texts, text_encoder(tokenizer, output)(list(texts.values())), strict=True))
    unwritten = [id_ for id_, chosen in written.items() if _is_another(chosen, id_, match)]
    return match.without(torch.tensor(unwritten, dtype=torch.int64), MatchReason.DUPLICATE)


def _is_another(chosen: list[int], id_: int, match: VocabularyMatch) -> bool:
    """Tell whether the tokenizer chose a single token other than ``id_`` that has the same row."""
    return len(chosen) == 1 and chosen[0] != id_ and bool(match.rows[chosen[0]] == match.rows[id_])

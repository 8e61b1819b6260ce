"""TokAlign: each new token gets the row of the token of the model with the most similar use in a corpus.

Source: Li, Zhang & Zong (2025), "TokAlign: Efficient Vocabulary Adaptation via Token Alignment" (arXiv:2506.03523),
without its subsequent training. The paper trains GloVe vectors, for which there is no maintained package; here they
are skip-gram vectors of gensim with the same dimension, window and minimum count. Unlike GloVe vectors they share a
large common component, so they are centred, and representations are compared by cosine instead of the inner product of
the authors' code. With 4.5 MB of technical English and the tokenizers of Gemma and SmolLM2, 69 % of shared tokens that
are treated as new tokens are mapped to themselves that way, and 3 % by the inner product.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.vectors import SEED, TokenizedCorpus, check_corpus, check_packages
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.vocabulary.tokens import Vocabulary

LOG = logging.getLogger(__name__)

DIMENSION = 300
EPOCHS = 5
MINIMUM_COUNT = 5
WINDOW = 15
PIVOTS = 300

_SIMILARITIES_AT_A_TIME = 2**24
_EXAMPLE = '{"Ġcolour": "Ġcolor"}'


def check_tokalign(parameters: OmpParameters, place: str) -> None:
    """Check the parameters, files and packages that TokAlign needs.

    Args:
        parameters: parameters of the recipe.
        place: their path in the recipe, for messages.

    Raises:
        OmpError: if neither or both of ``corpus`` and ``token_map`` are set, the file cannot be read, or gensim is
            missing but needed for training vectors.
    """
    if (parameters.corpus is None) == (parameters.token_map is None):
        raise OmpError(
            f"{place}: approximation: tokalign needs either corpus: or token_map:, and "
            f"{'none is' if parameters.corpus is None else 'both are'} set; write the path of a text file or of a map."
        )
    if parameters.token_map is not None:
        read_token_map(parameters.token_map, f"{place}.token_map")
    elif parameters.corpus is not None:
        check_packages(("gensim",), f"{place}: approximation: tokalign")
        check_corpus(parameters.corpus, f"{place}.corpus")


def tokalign(new: NewTokens) -> RowFunction:
    """Copy the row of the mapped token of the model to each new token.

    The map is read from ``token_map``, or learnt from ``corpus``. Tokens that are not in the map get the mean of the
    anchors' rows, where the authors' code uses a random row.

    Raises:
        OmpError: if the map names a token that a tokenizer does not have, or the corpus is too small.
    """
    path = new.parameters.token_map
    if path is None:
        mapping = token_map(new)
    else:
        mapping = read_token_map(path, "parameters.token_map")
        _check_known(mapping, new.output, f"{path} maps", "the output tokenizer")
        _check_known(mapping.values(), new.model, f"{path} maps to", "the model")
    row_of = {token.text: id_ for id_, token in new.model.tokens.items()}
    targets = [new.output.tokens[id_].text for id_ in new.problem.target_ids.tolist()]
    mapped = torch.tensor([text in mapping for text in targets], dtype=torch.bool)
    copied = torch.tensor([row_of[mapping[text]] for text in targets if text in mapping], dtype=torch.int64)
    LOG.info("%d of %d new tokens are not in the map and get the mean row", int((~mapped).sum()), len(mapped))

    def rows(weight: Tensor, _is_head: bool) -> Tensor:
        new_rows = new.mean_row(weight).repeat(len(mapped), 1)
        new_rows[mapped.to(weight.device)] = weight[copied.to(weight.device)].float()
        return new_rows

    return rows


def token_map(new: NewTokens) -> dict[str, str]:
    """Learn the most similar token of the model for each new token from ``corpus``.

    The vectors of the two tokenizers are trained separately, so only relations between them are comparable: a token is
    represented by its cosines with the pivots, 300 random anchors, and mapped to the token of the model with the most
    similar representation.

    Returns:
        The string of a token of the model for the string of each new token that is frequent enough in the corpus.

    Raises:
        OmpError: if the corpus is not in UTF-8, or no anchor is frequent enough with both tokenizers.
    """
    corpus, problem = new.parameters.corpus, new.problem
    assert corpus is not None, "checked by check_tokalign()"
    of_output = centred(learn_skipgram_vectors(corpus, new.output, new.output_tokenizer))
    of_model = centred(learn_skipgram_vectors(corpus, new.model, new.tokenizer))
    both = (of_output[problem.atom_ids].any(dim=1) & of_model[new.anchor_rows].any(dim=1)).nonzero().squeeze(1)
    if not len(both):
        raise OmpError(
            f"parameters.corpus: no token of both vocabularies is frequent enough in {corpus}; name a longer text."
        )
    chosen = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(SEED))[:PIVOTS]]
    targets = problem.target_ids[of_output[problem.target_ids].any(dim=1)]
    candidates = of_model.any(dim=1).nonzero().squeeze(1)
    best = nearest(
        relative(of_output[targets], of_output[problem.atom_ids[chosen]]),
        relative(of_model[candidates], of_model[new.anchor_rows[chosen]]),
    )
    pairs = zip(targets.tolist(), candidates[best].tolist(), strict=True)
    return {new.output.tokens[target].text: new.model.tokens[row].text for target, row in pairs}


def learn_skipgram_vectors(corpus: str, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Train skip-gram vectors of a vocabulary's tokens.

    Args:
        corpus: path of a text file in UTF-8.
        vocabulary: vocabulary of the tokenizer.
        tokenizer: tokenizer for the corpus; not modified.

    Returns:
        float32 (V, d), zero rows for tokens that are not text or not frequent enough.

    Raises:
        OmpError: if the file is not in UTF-8.
    """
    from gensim.models import Word2Vec

    text = TokenizedCorpus.read(corpus, tokenizer, "parameters.corpus")
    make_model = functools.partial(
        Word2Vec, vector_size=DIMENSION, min_count=text.minimum_count(MINIMUM_COUNT), window=WINDOW, sg=1
    )
    learnt = text.train(make_model, str, text.passes(EPOCHS)).wv
    vectors = torch.zeros(vocabulary.size, DIMENSION)
    for key, place in learnt.key_to_index.items():
        token = vocabulary.tokens.get(int(key))
        if token is not None and token.is_text:
            vectors[token.id] = torch.from_numpy(learnt.vectors[place])
    return vectors


def centred(vectors: Tensor) -> Tensor:
    """Normalise vectors float32 (V, d) to unit length and subtract their mean; zero rows mean no vector and stay."""
    present = vectors.any(dim=1)
    result = normalize(vectors, dim=1)
    result[present] -= result[present].mean(dim=0)
    return result


def relative(vectors: Tensor, pivots: Tensor) -> Tensor:
    """Return the cosines float32 (T, P) of vectors (T, d) with pivots (P, d), normalised to unit rows."""
    return normalize(normalize(vectors, dim=1) @ normalize(pivots, dim=1).T, dim=1)


def nearest(targets: Tensor, candidates: Tensor) -> Tensor:
    """Return the index int64 (B,) of the candidate (C, P) with the largest inner product with each target (B, P)."""
    step = max(1, _SIMILARITIES_AT_A_TIME // len(candidates))
    parts = tqdm(targets.split(step), desc="Aligning tokens", leave=False, disable=None)
    return torch.cat([(part @ candidates.T).argmax(dim=1) for part in parts])


def write_token_map(path: Path, mapping: Mapping[str, str]) -> None:
    """Write a map as JSON, one token per line."""
    text = json.dumps(dict(mapping), ensure_ascii=False, indent=1) + "\n"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")  # token strings need not be valid text


def read_token_map(path: str | Path, place: str) -> dict[str, str]:
    """Read a map from token strings of the output tokenizer to token strings of the model.

    Args:
        path: path of a JSON file.
        place: its recipe key, for messages.

    Returns:
        The map.

    Raises:
        OmpError: if the file cannot be read, or is not such a map.
    """
    try:
        read: Any = json.loads(Path(path).read_text(encoding="utf-8", errors="surrogatepass"))
    except OSError as error:
        raise OmpError(f"{place}: {path} cannot be read ({error.strerror}); name a JSON file.") from None
    except ValueError as error:
        raise OmpError(f"{place}: {path} is not JSON in UTF-8 ({error}); write {_EXAMPLE}.") from None
    if not isinstance(read, dict) or not all(isinstance(value, str) for value in read.values()):
        raise OmpError(f"{place}: {path} does not map strings to strings; write {_EXAMPLE}.")
    return read


def _check_known(texts: Iterable[str], vocabulary: Vocabulary, begin: str, whose: str) -> None:
    """Raise an OmpError if the vocabulary lacks one of these tokens."""
    known = {token.text for token in vocabulary.tokens.values()}
    unknown = [text for text in dict.fromkeys(texts) if text not in known]
    if unknown:
        first = ", ".join(map(repr, unknown[:3]))
        raise OmpError(
            f"parameters.token_map: {begin} {len(unknown)} tokens that {whose} does not have (first: {first}); "
            "write tokens as they are in the vocabulary, such as 'Ġthe'."
        )

"""Find new rows that are far from what the rows of their tokens' pieces predict; no model runs.

A ridge regression of anchors' rows on the mean row of their pieces tells a part of every row. What it leaves of a new
row is the donor's part. The row of an unrelated token, a combination of rows that rebuilds a direction, or a direction
that was added to a row, makes this part larger than those of other new rows. How large they are depends on how rows
are made, so that new rows are compared with each other and not with anchors. The first principal direction of the
anchors is left out: it says how frequent tokens are, and honest rows differ most in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.initializers.regression import pieces_of_anchors
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.tokens import Vocabulary

ROW_NAMES = {VocabularyRole.INPUT: "input row", VocabularyRole.HEAD: "head row"}
"""What a row of each matrix is called. Where the two are tied, it is an input row."""

FAR = "{} far from its pieces"
"""The reason for which a row is flagged whose donor's part is large, by the row's name."""

SPREADS = 4.0
"""A donor's part is suspicious that is so many spreads above the median; a spread is from the median to the 84 %."""

FEWEST = 20
"""Anchors, or new rows, with pieces below which nothing is compared."""

SAMPLE = 2048
"""Anchors that the regression is fitted on. Twice as many find the same rows."""

RIDGE = 0.3
WIDTH = 768
"""Columns that are compared: of wider matrices, every second, third, … is."""

_ROWS_AT_A_TIME = 8192


class PieceCheck:
    """The pieces of new tokens and of a sample of the anchors, to check rows of all matrices of a model.

    Attributes:
        ids: int64 (B,), output ids of the new tokens.
        anchors: int64 (N,), output ids of the anchors.
    """

    def __init__(self, base: Alignment, output: Vocabulary, ids: Tensor) -> None:
        """Segment the tokens.

        Args:
            base: the base's vocabulary beside the output's.
            output: the output vocabulary.
            ids: int64 (B,), output ids of new tokens.
        """
        anchors = base.match.atoms()
        sample = anchors[torch.linspace(0, max(0, len(anchors) - 1), min(SAMPLE, len(anchors))).long()]
        data = [output.tokens[id_].data for id_ in sample.tolist()]
        split = pieces_of_anchors(data, base.vocabulary.ids_by_bytes)
        self.ids, self._size = ids, output.size
        self.anchors = sample[torch.tensor([bool(found) for found in split], dtype=torch.bool)]
        self._of_anchors = [found for found in split if found]
        self._of_new = base.pieces(output, ids.tolist())

    def distances(self, base: Tensor, kept: Tensor, new: Tensor) -> Tensor | None:
        """Return how large the donor's part of each output row is, float32 (V,); it is suspicious above 1.

        It is 0 for rows that are not new and for tokens without pieces; None where too few rows can be compared.

        Args:
            base: (R, d) of a floating dtype, the base's matrix, with the rows of the pieces.
            kept: (N, d), rows of the anchors.
            new: (B, d), rows of the new tokens.
        """
        judged = torch.tensor([bool(found) for found in self._of_new], dtype=torch.bool)
        if min(len(self.anchors), int(judged.sum())) < FEWEST:
            return None
        base, kept, new = (matrix[:, :: -(-base.shape[1] // WIDTH)] for matrix in (base, kept, new))
        pieces_mean, mean = _means(self._of_anchors, base), kept.float().mean(dim=0)
        center = pieces_mean.mean(dim=0)
        pieces_mean -= center
        gram = pieces_mean.T @ pieces_mean
        ridge = RIDGE * gram.diagonal().mean()
        gram.diagonal().add_(ridge.clamp(min=torch.finfo(torch.float32).tiny))
        centred = kept.float() - mean
        weights = torch.linalg.solve(gram, pieces_mean.T @ centred)
        axis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1:]
        parts = []
        for start in range(0, len(new), _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            left = new[part].float() - mean - (_means(self._of_new[part], base) - center) @ weights
            parts.append((left - left @ axis @ axis.T).norm(dim=1).cpu())
        sizes = torch.cat(parts) * judged
        median, upper = sizes[judged].quantile(torch.tensor([0.5, 0.84]))
        distances = torch.zeros(self._size)
        distances[self.ids] = sizes / (median + SPREADS * (upper - median)).clamp(min=torch.finfo(torch.float32).tiny)
        return distances


def matrices_of(model: PreTrainedModel) -> dict[VocabularyRole, Tensor]:
    """Return a model's input embedding (V, d), and its head (V, d) if the two are not tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = {VocabularyRole.INPUT: embedding.get_parameter("weight").detach()}
    if head is not None and head.get_parameter("weight") is not embedding.get_parameter("weight"):
        matrices[VocabularyRole.HEAD] = head.get_parameter("weight").detach()
    return matrices


def _means(split: Sequence[Sequence[int]], base: Tensor) -> Tensor:
    """Return the mean row of each token's pieces, float32 (T, d); 0 for tokens without pieces."""
    flat = torch.tensor([row for rows in split for row in rows], dtype=torch.int64)
    ends = torch.tensor([len(rows) for rows in split]).cumsum(0)
    starts = (ends - ends.diff(prepend=torch.zeros(1, dtype=torch.int64))).to(base.device)
    return torch.nn.functional.embedding_bag(flat.to(base.device), base, starts, mode="mean").float()

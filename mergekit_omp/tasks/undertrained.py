"""Under-trained tokens: rows that a model's training hardly touched, which ``magikarp: true`` leaves aside."""

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from mergekit.options import MergeOptions
from mergekit.tokensurgeon.magikarp import well_trained_tokens

from mergekit_omp.checkpoints.architecture import VocabularyRole, donor_weight
from mergekit_omp.checkpoints.tokenizers import vocabulary_of
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.vocabulary.tokens import TokenKind


class FindTrainedRows(Task[torch.Tensor]):
    """Tell which rows of a model belong to well-trained tokens: bool [R], on the CPU.

    By mergekit's own ``well_trained_tokens``, after Land and Bartolo, "Fishing for Magikarp" (arXiv:2405.05417): rows
    of an unusually small norm, and rows that are close to the mean of the unused ones, are under-trained.
    """

    model: ModelReference
    embedding: LoadTensor
    embedding_axis: int
    head: LoadTensor  # the embedding again where a model ties the two
    head_axis: int
    trust_remote_code: bool

    def arguments(self) -> dict[str, Task]:
        """Both matrices."""
        return {"embedding": self.embedding, "head": self.head}

    @on_the_cpu
    def execute(self, embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Ask mergekit."""
        tokens = vocabulary_of(self.model, self.trust_remote_code).tokens.values()
        trained = well_trained_tokens(
            {token.text: token.id for token in tokens},
            embedding.movedim(self.embedding_axis, 0),
            head.movedim(self.head_axis, 0),
            known_unused=[token.text for token in tokens if token.kind is TokenKind.UNUSED],
        )
        texts = set(trained)
        result = torch.zeros(embedding.shape[self.embedding_axis], dtype=torch.bool)
        result[[token.id for token in tokens if token.text in texts]] = True
        return result


def find_trained_rows(model: ModelReference, options: MergeOptions) -> FindTrainedRows:
    """The task for one model."""
    embedding, embedding_axis = donor_weight(model, VocabularyRole.INPUT, options)
    head, head_axis = donor_weight(model, VocabularyRole.HEAD, options)
    return FindTrainedRows(
        model=model,
        embedding=embedding,
        embedding_axis=embedding_axis,
        head=head,
        head_axis=head_axis,
        trust_remote_code=options.trust_remote_code,
    )

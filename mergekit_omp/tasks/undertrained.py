"""Find under-trained tokens, which ``magikarp: true`` excludes: rows that training hardly changed."""

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from mergekit.options import MergeOptions

from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.checkpoints.weights import vocabulary_matrix
from mergekit_omp.compat import well_trained_tokens
from mergekit_omp.realign.rows import check_rows
from mergekit_omp.recipe.transplant import RecipeModel
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.tasks.resolved import Resolved
from mergekit_omp.vocabulary.tokens import TokenKind


class FindTrainedRows(Task[torch.Tensor]):
    """Find the rows of well-trained tokens of a model: bool (R,), on the CPU.

    Uses mergekit's ``well_trained_tokens``, after Land & Bartolo, "Fishing for Magikarp" (arXiv:2405.05417): rows with
    an unusually small norm, and rows close to the mean of unused rows, are under-trained.
    """

    model: Resolved[RecipeModel]
    embedding: LoadTensor
    embedding_axis: int
    head: LoadTensor  # equal to the embedding if the two are tied
    head_axis: int

    def arguments(self) -> dict[str, Task]:
        """Return the tasks that load both matrices."""
        return {"embedding": self.embedding, "head": self.head}

    @on_the_cpu
    def execute(self, embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Run mergekit's test."""
        tokens = self.model.vocabulary.tokens.values()
        ids = torch.tensor([token.id for token in tokens])
        embedding, head = embedding.movedim(self.embedding_axis, 0), head.movedim(self.head_axis, 0)
        for weight, load in ((embedding, self.embedding), (head, self.head)):
            check_rows(weight, ids, f"{load.tensor} of {self.model}")
        trained = well_trained_tokens(
            {token.text: token.id for token in tokens},
            embedding,
            head,
            known_unused=[token.text for token in tokens if token.kind is TokenKind.UNUSED],
        )
        texts = set(trained)
        result = torch.zeros(len(embedding), dtype=torch.bool)
        result[[token.id for token in tokens if token.text in texts]] = True
        return result


def find_trained_rows(model: RecipeModel, options: MergeOptions) -> FindTrainedRows:
    """Return the task for one model.

    Raises:
        OmpError: if it has no weights.
    """
    embedding, embedding_axis = vocabulary_matrix(model.reference, VocabularyRole.INPUT, options, model.key)
    head, head_axis = vocabulary_matrix(model.reference, VocabularyRole.HEAD, options, model.key)
    return FindTrainedRows(
        model=model, embedding=embedding, embedding_axis=embedding_axis, head=head, head_axis=head_axis
    )

"""Compute a token-level distillation loss with a teacher that has the student's tokenizer.

    python examples/distillation_loss.py --student small/ --teacher big/ --heal-minutes 10

Both models read the same ids, so KL(teacher ‖ student) is a sum over one vocabulary. It is printed for the
transplanted teacher, for the same after a short training (``--heal-minutes M``, or ``--healed FOLDER``), and for a
teacher whose rows of new tokens are zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import one_vocabulary
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows


def distillation_loss(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor, n_tokens: int) -> Tensor:
    """Compute KL(teacher ‖ student) of the next token in nats, as the mean over the positions of ``ids``.

    Args:
        teacher: the teacher, without gradients.
        student: the student, with gradients if they are enabled.
        ids: int64 (B, T), ids of the common vocabulary.
        n_tokens: size of that vocabulary; further rows are padding, and their number may differ.

    Returns:
        A scalar, at least 0.
    """
    with torch.no_grad():
        target = teacher(ids).logits[..., :n_tokens].float().log_softmax(dim=-1)  # (B, T, V)
    prediction = student(ids).logits[..., :n_tokens].float().log_softmax(dim=-1)
    return functional.kl_div(prediction.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the loss for each teacher, and the size of the gradient that reaches the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_vocabulary.add_arguments(parser, keeps="student", changes="teacher")
    one_vocabulary.add_healing(parser, changes="teacher")
    parser.add_argument(
        "--text", type=Path, help="text of which both read the beginning (default: four built-in texts)"
    )
    options = parser.parse_args(arguments)
    student_folder, teacher_folder = one_vocabulary.folders(options)
    healed_folder = one_vocabulary.healed(options, teacher_folder)
    zeros = options.out.with_name(options.out.name + "-zeros")
    one_vocabulary.transplant(one_vocabulary.changes(options), student_folder, zeros, {"approximation": "zero"})

    student, tokenizer = one_vocabulary.load(student_folder)
    texts = {options.text.name: options.text.read_text(encoding="utf-8")} if options.text else builtin_texts()
    ids = [one_vocabulary.with_start(tokenizer, windows(text, WINDOW_BYTES)[0]) for text in texts.values()]
    print(f"\n{'nats a token':<24}" + "".join(f"{name:>14}" for name in texts))
    teachers = {"transplanted teacher": teacher_folder, "healed teacher": healed_folder, "zeros for new rows": zeros}
    for name, folder in teachers.items():
        if folder is None:
            continue
        teacher, _ = one_vocabulary.load(str(folder))
        student.zero_grad()
        losses = []
        for text_ids in ids:
            loss = distillation_loss(teacher, student, text_ids, len(tokenizer))
            loss.backward()
            losses.append(loss.item())
        gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        print(f"{name:<24}" + "".join(f"{loss:>14.4f}" for loss in losses))
        print(f"  gradient of norm {norm:.4f} in {len(gradients)} of {len(list(student.parameters()))} tensors")


if __name__ == "__main__":
    main()

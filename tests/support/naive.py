"""The method as the paper writes it, on an unmodified Hugging Face model, and its inputs: the
oracle of the loss.

Two forwards, mixed hidden states, one-hot labels, autograd, float64.
"""

import numpy as np
import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.batches.cut import StepCounts
from sftmix.loss.head import CausalLMWithLoss
from sftmix.loss.logit_transform import find_logit_transform

# (total tokens, response tokens): ragged pairs, one of them with responses of very different length
LENGTHS = [(12, 7), (9, 3), (6, 5), (14, 2), (8, 4)]
PARTNERS = [(0, 1, 0.3), (3, 2, 0.85)]  # the last example has no partner


def make_model(name):
    settings, transform = FAMILIES[name]
    return model_from(settings), transform


def model_from(settings, dtype=torch.float64):
    """Returns a random model in evaluation mode, away from zero biases and equal norms."""
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    options = {"attn_implementation": "eager", "dtype": dtype}
    if hasattr(config, "num_local_experts"):
        options["experts_implementation"] = "eager"  # the others have no float64
    model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=dtype))
    return model.eval()


def make_examples():
    rng = np.random.default_rng(0)
    examples = []
    for length, responses in LENGTHS:
        mask = np.zeros(length, dtype=bool)
        mask[length - responses :] = True
        examples.append((rng.integers(3, 97, length).astype(np.int32), mask))
    return examples


def hidden_before_head(model, ids):
    """Runs the unmodified model on one unpadded sequence; returns what its head is given, and its
    logits."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    output = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    hook.remove()
    return seen[0][0], output.logits[0]


def naive_loss(model, examples, transform):
    """The method as the paper writes it: means over all response tokens, and over all mixed
    positions."""

    def finished(logits):
        logits = logits * transform.get("scale", 1.0)
        cap = transform.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    hidden, labels, ntp = [], [], []
    for ids, mask in examples:
        z, logits = hidden_before_head(model, ids)
        at = np.flatnonzero(mask)
        label = torch.from_numpy(ids[at].astype(np.int64))
        ntp.append(torch.nn.functional.cross_entropy(logits[at - 1], label, reduction="sum"))
        hidden.append(z[at - 1])
        labels.append(torch.nn.functional.one_hot(label, 97).double())
    mixup, count = [], 0
    for c, u, share in PARTNERS:
        n = min(len(hidden[c]), len(hidden[u]))
        lam = float(np.float32(share))
        mixed = finished(
            model.get_output_embeddings()(lam * hidden[c][:n] + (1 - lam) * hidden[u][:n])
        )
        target = lam * labels[c][:n] + (1 - lam) * labels[u][:n]
        mixup.append(torch.nn.functional.cross_entropy(mixed, target, reduction="sum"))
        count += n
    num_tokens = sum(responses for _, responses in LENGTHS)
    return sum(ntp) / num_tokens, sum(mixup) / count, StepCounts(num_tokens, count)


def naive_mixup_of_inputs(model, examples):
    """Each pair's sequence written out position by position, aligned at the first response
    token."""
    table = model.get_input_embeddings()
    losses = []
    for c, u, share in PARTNERS:
        lam = float(np.float32(share))
        members = [
            (torch.from_numpy(ids.astype(np.int64)), int(mask.argmax()), int(mask.sum()))
            for ids, mask in (examples[c], examples[u])
        ]
        (ids_c, start_c, n_c), (ids_u, start_u, n_u) = members
        n, prompt = min(n_c, n_u), max(start_c, start_u)
        sequence = []
        for position in range(prompt + n - 1):
            at_c, at_u = position - prompt + start_c, position - prompt + start_u
            if at_c < 0:
                sequence.append(table(ids_u[at_u]))
            elif at_u < 0:
                sequence.append(table(ids_c[at_c]))
            else:
                sequence.append(lam * table(ids_c[at_c]) + (1 - lam) * table(ids_u[at_u]))
        log_p = torch.log_softmax(
            model(inputs_embeds=torch.stack(sequence)[None]).logits[0, prompt - 1 :], dim=-1
        )
        assert len(log_p) == n
        for k in range(n):
            losses.append(
                -lam * log_p[k, ids_c[start_c + k]] - (1 - lam) * log_p[k, ids_u[start_u + k]]
            )
    return sum(losses) / len(losses)


def ours_of(model, *, packs=False):
    wrapped = CausalLMWithLoss(model)
    wrapped.projection.transform = find_logit_transform(wrapped, torch.device("cpu"), packs=packs)
    return wrapped

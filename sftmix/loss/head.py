"""The head of a causal language model, replaced by one that computes the loss in its own forward.

The head is found through `get_output_embeddings`, not by a list of families. The transformer runs
unchanged and calls its head as usual, and the head computes the loss from the hidden states in the
module of its weight. So ZeRO-3's hooks gather the weight for this module once per micro-batch, for
any number of chunks, and never for the rest of the model (`docs/decisions.md` says what fails
otherwise).

What a model does to its logits after the head (Gemma's soft-cap, Cohere's scale) is not read from a
config key. It is measured by sending known values through the model's own forward:
`find_logit_transform`.

Axes: B examples, S positions, T requested rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sftmix.batches.documents import Documents
from sftmix.batches.mixed_inputs import MixedInputs
from sftmix.errors import ConfigError
from sftmix.kernels.fused_linear_mixup_cross_entropy import fused_linear_mixup_cross_entropy
from sftmix.kernels.linear_token_nll import linear_token_scores
from sftmix.kernels.mixed_embeddings import mixed_embeddings
from sftmix.kernels.mixup_cross_entropy import mixup_cross_entropy
from sftmix.loss.logit_transform import LogitTransform, ProbeRequest
from sftmix.loss.packed_attention import attending_within
from sftmix.loss.requests import (
    HeadResult,
    LossRequest,
    LossResult,
    MixedRequest,
    MixedResult,
    Request,
    ScoreRequest,
    ScoreResult,
)

Timer = Callable[[str], contextlib.AbstractContextManager[None]]  # entered around a named part


def no_timer(part: str) -> contextlib.AbstractContextManager[None]:
    """Measures nothing."""
    return contextlib.nullcontext()


class HeadProjection(nn.Module):
    """Owns the head's weight (V, D) and bias (V,). Everything that reads them happens in its
    forward."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, head: Any):
        super().__init__()
        self.weight = head.weight
        self.bias = getattr(head, "bias", None)
        self.transform = LogitTransform()
        self.timer: Timer = no_timer

    def forward(self, hidden: Tensor, request: Request | None) -> Tensor | HeadResult:
        with self.timer("head"):
            return head_output(hidden, request, self.weight, self.bias, self.transform)


def head_output(
    hidden: Tensor,
    request: Request | None,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
) -> Tensor | HeadResult:
    """Returns what is requested of hidden states (B, S, D); without a request the logits (B, S, V),
    before the transform. weight: (V, D). bias: (V,)."""
    if request is None:
        return nn.functional.linear(hidden, weight, bias)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, request.rows)
    if isinstance(request, ScoreRequest):
        losses = linear_token_scores(
            rows,
            weight,
            request.labels,
            bias,
            transform.scale,
            transform.softcap,
            backend=request.backend,
        )
        return ScoreResult(*losses)
    if isinstance(request, MixedRequest):
        logits = nn.functional.linear(rows, weight, bias)
        mixup = mixup_cross_entropy(
            logits,
            None,
            request.labels,
            request.lam,
            transform.scale,
            transform.softcap,
            backend=request.backend,
        )
        return MixedResult(mixup.sum() / max(1, request.num_mixup_tokens))
    fused = fused_linear_mixup_cross_entropy(
        rows,
        weight,
        request.labels,
        request.pairs,
        request.lam,
        request.mixup_weight,
        bias,
        transform.scale,
        transform.softcap,
        request.num_ntp_tokens,
        request.num_mixup_tokens,
        request.backend,
        ntp_weight=request.next_token.ntp_weight,
        weighting=request.next_token.token_weighting,
        alpha=request.next_token.eaft_alpha,
        label_smoothing=request.next_token.label_smoothing,
        row_weights=request.row_weights,
    )
    return LossResult(*fused, auxiliary=torch.zeros_like(fused.loss))


class LossHead:
    """Replaces the head. Without a request it returns logits, as the head did. With a request it
    keeps the result in `result`, and returns a stub with which the model's forward can finish.

    Not a module: ZeRO-3 adds a hook to the input of every module and expects its output in the
    backward, which the stub never takes part in. The module with the parameters is the projection.

    projection: a HeadProjection, or the head of `computing`. joins_graph: the stub depends on the
    loss, though no gradient comes from it. DDP looks in the model's output for what is trained.
    """

    def __init__(self, projection: Any, *, joins_graph: bool = False):
        self.projection = projection
        self.joins_graph = joins_graph
        self.request: Request | ProbeRequest | None = None
        self.result: HeadResult | None = None

    @property
    def weight(self) -> Tensor:
        return self.projection.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.projection, "bias", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        if isinstance(self.request, ProbeRequest):
            return self.request.values.expand(*hidden.shape[:-1], -1)
        output = self.projection(hidden, self.request)
        if isinstance(output, Tensor):
            return output  # logits
        assert self.result is None, "the model called its head twice in one forward"
        self.result = output
        stub = hidden.new_zeros(*hidden.shape[:-1], 1)
        if self.joins_graph and isinstance(output, LossResult):
            stub = stub + 0 * output.loss.to(stub.dtype)
        return stub


@contextlib.contextmanager
def computing(
    model: Any, request: Request | ProbeRequest, transform: LogitTransform
) -> Iterator[LossHead]:
    """Within the context the head of `model` computes the request, and keeps it in `result`.

    For a trainer that owns the model: the head stays a module of its parent, with its names,
    parameters and hooks (ZeRO-3, FSDP), and afterwards the model is as it was. Under autocast the
    products have its dtype, as those of the head's own forward. Raises ConfigError where the model
    names no head.
    """
    parent_name, _, attribute = (name := head_name(model)).rpartition(".")
    module, parent = model.get_submodule(name), model.get_submodule(parent_name)
    own_forward = vars(module).get("forward")

    def forward(hidden: Tensor, request: Request) -> Tensor | HeadResult:
        weight, bias = module.weight, getattr(module, "bias", None)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return head_output(hidden, request, weight, bias, transform)

    head = LossHead(module, joins_graph=True)
    head.request = request
    module.forward = forward
    vars(parent)[attribute] = head  # Python finds it before the module of that name
    try:
        yield head
    finally:
        del vars(parent)[attribute], module.forward
        if own_forward is not None:
            module.forward = own_forward


class CausalLMWithLoss(nn.Module):
    """A Hugging Face causal language model whose forward gives the loss, in one pass through the
    transformer."""

    def __init__(self, model: Any):  # a transformers model with a head
        super().__init__()
        self.model = model
        self.head_name = head_name(model)
        self.projection = HeadProjection(model.get_submodule(self.head_name))
        self.head = LossHead(self.projection)
        parent_name, _, attribute = self.head_name.rpartition(".")
        parent = model.get_submodule(parent_name)
        delattr(parent, attribute)  # torch does not allow a plain object in place of a module
        object.__setattr__(parent, attribute, self.head)
        # Look at attributes, not families: every mixture of experts in transformers with a router
        # loss has these two.
        self.auxiliary_weight = float(getattr(model.config, "router_aux_loss_coef", 0) or 0)
        self.has_router = self.auxiliary_weight > 0 and hasattr(
            model.config, "output_router_logits"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        request: Request | ProbeRequest | None,
        documents: Documents | None = None,
        images: dict[str, Tensor] | None = None,
    ) -> Tensor | HeadResult:
        """input_ids, attention_mask: (B, S). documents: of a packed row (B is 1), for a model whose
        attention is packed; all its rows must be. images: further arguments of a model that reads
        images. Returns LossResult for a LossRequest, ScoreResult for a ScoreRequest, otherwise the
        model's logits (B, S, V or K).
        """
        options = (
            {"output_router_logits": True}
            if self.has_router and isinstance(request, LossRequest)
            else {}
        )
        with self._noise(request, attention_mask, documents):
            output, result = self._run(
                request,
                documents,
                input_ids=input_ids,
                attention_mask=attention_mask,
                **options,
                **(images or {}),
            )
        if request is None or isinstance(request, ProbeRequest):
            return output.logits  # type: ignore[no-any-return]
        assert result is not None, "the model never called its head"
        if not isinstance(result, LossResult):
            return result
        assert isinstance(request, LossRequest), "the result is that of the request"
        if request.mixed_inputs is not None:
            mixup = self._mixup_of_mixed_inputs(input_ids, request, request.mixed_inputs)
            result = result._replace(
                loss=result.loss + request.mixup_weight * mixup, mixup=mixup.detach()
            )
        auxiliary = getattr(output, "aux_loss", None) if self.has_router else None
        if auxiliary is None:
            return result
        # transformers adds weight * aux_loss to a mean over tokens, so each micro-batch is weighted
        # by its share of the tokens.
        share = request.labels.numel() / max(1, request.num_ntp_tokens)
        auxiliary = auxiliary.to(result.loss.device) * (self.auxiliary_weight * share)
        return result._replace(loss=result.loss + auxiliary, auxiliary=auxiliary.detach())

    def _noise(
        self,
        request: Request | ProbeRequest | None,
        attention_mask: Tensor,
        documents: Documents | None,
    ) -> contextlib.AbstractContextManager[None]:
        alpha = request.next_token.neftune_alpha if isinstance(request, LossRequest) else 0.0
        if not alpha:
            return contextlib.nullcontext()
        if documents is None:
            lengths = attention_mask.sum(dim=1, keepdim=True).expand_as(attention_mask)
        else:
            each = documents.bounds.diff()
            lengths = each.repeat_interleave(each, output_size=attention_mask.shape[1])[None]
        return noisy_embeddings(self.model.get_input_embeddings(), alpha, lengths)

    def _run(
        self, request: Any, documents: Documents | None, **inputs: Any
    ) -> tuple[Any, HeadResult | None]:
        self.head.request, self.head.result = request, None
        context = contextlib.nullcontext() if documents is None else attending_within(documents)
        if documents is not None:
            inputs["position_ids"] = documents.position_ids
        try:
            with context:
                return self.model(**inputs, use_cache=False), self.head.result
        finally:
            self.head.request = self.head.result = None

    def _mixup_of_mixed_inputs(
        self, input_ids: Tensor, request: LossRequest, mixed: MixedInputs
    ) -> Tensor:
        # All ranks run this forward in every micro-batch, over one masked position if there is no
        # pair, so that the number of ZeRO-3's collectives does not depend on data.
        embedded = self.model.get_input_embeddings()(input_ids)
        flat = embedded.reshape(-1, embedded.shape[-1])
        interpolated = mixed_embeddings(
            flat, mixed.sources, mixed.source_lam, backend=request.backend
        )
        inputs = flat.new_zeros(mixed.attention_mask.numel(), flat.shape[1]).index_copy(
            0, mixed.places, interpolated
        )
        _, result = self._run(
            MixedRequest(
                mixed.rows, mixed.labels, mixed.lam, request.num_mixup_tokens, request.backend
            ),
            mixed.documents,
            inputs_embeds=inputs.view(*mixed.attention_mask.shape, -1),
            attention_mask=mixed.attention_mask,
        )
        assert isinstance(result, MixedResult), "the model never called its head"
        return result.mixup

    def plain_name(self, name: str) -> str:
        """Returns the Hugging Face name of one of this module's parameters or buffers, as in the
        model without adapters."""
        owner, _, rest = without_wrapper(name).partition(".")
        return rest if owner == "model" else f"{self.head_name}.{rest}"


@contextlib.contextmanager
def noisy_embeddings(embedding: nn.Module, alpha: float, lengths: Tensor) -> Iterator[None]:
    """Adds NEFTune's noise (https://arxiv.org/abs/2310.05914) to what `embedding` returns within
    the context: uniform in +-alpha / sqrt(L D), for an example of L tokens and D dimensions.

    lengths: (B, S), the tokens of each position's example. So the noise of an example does not
    depend on padding, nor on what it is packed with.
    """

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        size = alpha / (lengths.clamp(min=1) * output.shape[-1]).sqrt()
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * size[..., None].to(output.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def head_name(model: Any) -> str:
    """Returns the dotted name of the module that `get_output_embeddings` returns. Raises
    ConfigError."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ConfigError(
            f"{type(model).__name__} names no output embedding with a weight"
            " (get_output_embeddings), so its loss cannot be computed at the head. Use a causal"
            " language model."
        )
    return next(name for name, module in model.named_modules() if module is head)


def without_wrapper(name: str) -> str:
    """Returns the name that a parameter beside an adapter has in the model without adapters."""
    return name.replace(".base_layer.", ".")

"""Token ids of a conversation, and its response mask: which tokens carry loss.

The loss covers what the assistant says in every trained turn, with its end-of-turn token: content,
thoughts and calls. What the template itself inserts carries none: headers, an empty thought, a
further end of text. Where the template marks the generated part (`{% generation %}`), this holds.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sftmix.config.schema import TEMPLATE_DATE
from sftmix.data.control_tokens import Escaping, pattern_of
from sftmix.data.conversations import IMAGE, BadRow, Example, Message, Tools, texts_of
from sftmix.data.images import ImageStore
from sftmix.data.slots import Placed, Rendered, place_slots
from sftmix.data.template import at_date, marker_ids, rendering
from sftmix.errors import DataError, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
Span = tuple[int, int]  # characters [start, stop)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION: Message = {"role": "user", "content": "a"}
ANSWER: Message = {"role": "assistant", "content": "b"}


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer. prompt: between the end of a question and the place
    where a model would begin to answer. header: the part of it that a request for an answer adds;
    empty in templates without one. end: the end-of-turn token."""

    prompt: str
    header: str
    end: str


@dataclass(frozen=True)
class Region:
    """Characters [start, stop) that carry loss. at_prompt: it begins where a model would begin to
    write, else behind something that the template has inserted."""

    start: int
    stop: int
    at_prompt: bool = True


class ChatEncoder:
    """Turns conversations into token ids with a response mask. Needs a fast tokenizer with a chat
    template.

    date: what a template that reads the clock is told, ISO 8601. keep_control_tokens: the names of
    control tokens in the texts of users are control tokens. loss_on_inserted: what the template
    writes in the assistant's turn by itself carries loss, too. images: of the examples, for a model
    that reads them. counts: what was found so far that a user should know.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        date: str = TEMPLATE_DATE,
        keep_control_tokens: bool = False,
        loss_on_inserted: bool = False,
        images: ImageStore | None = None,
    ):
        self.tokenizer = tokenizer
        self._images = images
        self._as_parts = False
        self.special_ids = np.array(sorted(marker_ids(tokenizer)), dtype=np.int64)
        self.counts: Counter[str] = Counter()
        self._date = date
        self._keep = keep_control_tokens
        self._inserted = loss_on_inserted
        self._escaping = Escaping(tokenizer)
        self._ends = pattern_of(set(tokenizer.convert_ids_to_tokens(self.special_ids.tolist())))
        self._frame: Frame | None = None

    def encode(self, examples: list[Example]) -> list[Encoded | str | BadRow]:
        """Returns, for each example, its (N,) token ids and (N,) mask, the reason why it cannot be
        trained on, or what is wrong with it.

        Raises DataError if no conversation could be trained with this template.
        """
        written: list[tuple[str, list[Region]] | BadRow] = []
        for example in examples:
            try:
                written.append(self._written(example))
            except BadRow as error:
                written.append(error)
        texts = [found[0] for found in written if not isinstance(found, BadRow)]
        encodings = iter(self._escaping.backend.encode_batch(texts, add_special_tokens=False))
        return [
            found
            if isinstance(found, BadRow)
            else self._with_images(example, self._masked(*found, next(encodings)))
            for example, found in zip(examples, written, strict=True)
        ]

    def _with_images(
        self, example: Example, encoded: Encoded | str | BadRow
    ) -> Encoded | str | BadRow:
        """Returns the example with the tokens of its images in their places."""
        if self._images is None or not isinstance(encoded, tuple):
            return encoded
        ids, mask = encoded
        processor = self._images.processor
        places = np.flatnonzero(ids == processor.token_id)
        digests = example.images
        if len(places) != len(digests):
            return BadRow(
                f"the chat template writes {len(places)} of its {counted(len(digests), 'image')}."
                " Name one that writes them with tokenizer.chat_template"
            )
        parts: list[Encoded] = []
        start = 0
        for place, digest in zip(places, digests, strict=True):
            image = self._images.tokens(digest)
            parts += [(ids[start:place], mask[start:place]), (image, np.zeros(len(image), bool))]
            start = int(place) + 1
        parts.append((ids[start:], mask[start:]))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def image_numbers(self, example: Example) -> list[int]:
        """Returns the rows of the file of images that hold those of an example, in order."""
        return [self._images.numbers[digest] for digest in example.images] if self._images else []

    def cuts_image(self, ids: NDArray[np.int32], limit: int) -> bool:
        """Returns whether the first `limit` ids lack a part of an image."""
        return self._images is not None and bool(
            (ids[limit:] == self._images.processor.token_id).any()
        )

    def _as_read(self, message: Message) -> Message:
        """Returns a message as templates read it: its content as parts where it has images, or the
        template wants it so."""
        read = {key: value for key, value in message.items() if key not in ("train", "images")}
        content = message["content"]
        if not content or not (self._as_parts or "images" in message):
            return read
        parts: list[dict[str, str]] = []
        for number, text in enumerate(content.split(IMAGE) if "images" in message else [content]):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        return {**read, "content": parts}

    def _written(self, example: Example) -> tuple[str, list[Region]]:
        """Returns the text to tokenise, and its parts that carry loss."""
        for text in texts_of(list(example.messages)):
            self._escaping.check(text)
        if example.is_text:
            return self._plain(example)
        frame = self.frame(example.place)
        with rendering():
            rendered = place_slots(example.messages, example.tools, self._render)
        self.counts["thoughts of earlier turns that the chat template leaves out"] += (
            rendered.dropped_thoughts
        )
        self._check_calls(example, rendered)
        return self._escaped(rendered, self._regions(example, rendered, frame))

    def _plain(self, example: Example) -> tuple[str, list[Region]]:
        """A text without turns: the beginning of sequence, the text, the end of sequence."""
        [message] = example.messages
        head = self._escaping.escape(self.tokenizer.bos_token or "")
        end = self._escaping.escape(self.tokenizer.eos_token)
        whole = head + self._quoted(message["content"]) + end
        return whole, [Region(len(head), len(whole), at_prompt=False)]

    def _quoted(self, text: str) -> str:
        """Returns a text of a user as it is to be tokenised."""
        if not self._escaping.control.search(text):
            return text
        if self._keep:
            return self._escaping.escape(text)
        self.counts["texts that quote a control token, which is tokenised as text"] += 1
        return text

    def _render(
        self, messages: list[Message], tools: Tools = (), *, generation_prompt: bool = False
    ) -> str:
        [text], _ = self._render_with_spans(messages, tools, generation_prompt=generation_prompt)
        return text

    def _render_with_spans(
        self,
        messages: list[Message],
        tools: Tools = (),
        *,
        generation_prompt: bool = False,
        with_spans: bool = False,
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        chosen = self.tokenizer.get_chat_template(tools=list(tools) or None)
        named: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        found: Any = render_jinja_template(
            [[self._as_read(message) for message in messages]],
            tools=list(tools) or None,
            chat_template=at_date(chosen, self._date),
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=with_spans,
            **named,
        )
        return found[0], found[1]

    def frame(self, place: str) -> Frame:
        """Returns the frame of the template, by a plain question and its answer. place: for errors.
        Raises DataError if no conversation could be trained with this template."""
        if self._frame is None:
            with rendering(place):
                found = self._plain_exchange(place)
                asked = self._render([QUESTION], generation_prompt=True)
                bare = self._render([QUESTION])
            question, answer = found.placed
            end = self._ends.search(found.text, answer.stop)
            if end is None:
                raise DataError(
                    f"{place}: the chat template writes no end-of-turn token after the"
                    " assistant's text, so the model would never learn to stop. Name a template"
                    " that writes one (tokenizer.chat_template)."
                )
            header = "".join(self._split(asked)[self._num_same(asked, bare) :])
            self._check_parity(found.text)
            self._frame = Frame(asked[question.stop :], header, end[0])
        return self._frame

    def _plain_exchange(self, place: str) -> Rendered:
        """Returns the plain question and answer. Some templates, of models that read images, only
        write texts that are parts of a list. Raises DataError."""
        problem = ""
        for self._as_parts in (False, True):
            try:
                with rendering():
                    return place_slots((QUESTION, ANSWER), (), self._render)
            except BadRow as error:
                problem = problem or str(error).rstrip(".")
        raise DataError(f"{place}: {problem}. Name another with tokenizer.chat_template.")

    def _split(self, text: str) -> list[str]:
        """Returns the control tokens and the other characters of a text."""
        return re.findall(f"{self._ends.pattern}|.", text, re.DOTALL)

    def _num_same(self, text: str, other: str) -> int:
        """Returns how many of `_split` both texts begin with."""
        pairs = list(zip(self._split(text), self._split(other), strict=False))
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def _check_parity(self, text: str) -> None:
        """Raises DataError if the tokenizer with escaped control tokens gives other ids."""
        ours = self._escaping.backend.encode(
            self._escaping.escape(text), add_special_tokens=False
        ).ids
        theirs = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours != list(theirs):
            raise DataError(
                "tokenizer: with its special tokens renamed it gives other ids, so that quotations"
                f" of them cannot be told apart: {ours} against {theirs} for {text!r}. Use"
                " another tokenizer (tokenizer.path)."
            )

    def _check_calls(self, example: Example, rendered: Rendered) -> None:
        """Raises BadRow if the template leaves out tools or arguments of calls, or if these quote a
        control token."""
        calls = [call["function"] for m in example.messages for call in m.get("tool_calls", ())]
        names = [tool.get("function", tool).get("name") for tool in example.tools]
        for what, wanted in (
            ("`tools`", [name for name in names if isinstance(name, str)]),
            (
                "arguments of `tool_calls`",
                [
                    key
                    for call in calls
                    if isinstance(call["arguments"], dict)
                    for key in call["arguments"]
                ],
            ),
        ):
            missing = [name for name in wanted if name not in rendered.text]
            if missing:
                raise BadRow(
                    f"the chat template does not write the {what} ({', '.join(missing)}). Name one"
                    " that does with tokenizer.chat_template, or leave them out with"
                    " data.ignore_columns"
                )
        inside = (*texts_of([call["arguments"] for call in calls]), *texts_of(list(example.tools)))
        if not self._keep and any(map(self._escaping.control.search, inside)):
            raise BadRow("its tools or calls quote a control token. Remove it from the row")

    def _regions(self, example: Example, rendered: Rendered, frame: Frame) -> list[Region]:
        if GENERATION.search(self.tokenizer.get_chat_template(tools=list(example.tools) or None)):
            return self._marked_regions(example, rendered)
        turns = [rendered.of_turn(turn) for turn in example.trained_turns]
        return [self._region(rendered, placed, frame) for placed in turns if placed]

    def _region(self, rendered: Rendered, placed: list[Placed], frame: Frame) -> Region:
        first, last = placed[0], placed[-1]
        index, end = rendered.placed.index(first), rendered.placed.index(last)
        previous = rendered.placed[index - 1].stop if index else 0
        is_last = last is rendered.placed[-1]
        following = len(rendered.text) if is_last else rendered.placed[end + 1].start
        start, at_prompt = self._start(rendered.text[previous : first.start], first, frame)
        after = rendered.text[last.stop : following]
        if last.slot.kind == "call":
            found = list(re.finditer(re.escape(frame.end), after))[:1]
        else:
            found = list(self._ends.finditer(after))
            found = found[-1:] if self._inserted and is_last else found[:1]
        if not found:
            raise BadRow(
                f"the chat template writes no end-of-turn token after turn {last.slot.turn + 1}"
            )
        return Region(previous + start, last.stop + found[0].end(), at_prompt)

    def _start(self, between: str, first: Placed, frame: Frame) -> tuple[int, bool]:
        """Returns where a turn begins to carry loss in what stands before its first text, and
        whether a model would begin to write there."""
        prompt, at = None, between.rfind(frame.header) if frame.header else -1
        if (frame.prompt or not frame.header) and between.startswith(frame.prompt):
            prompt = len(frame.prompt)
        elif at >= 0:
            prompt = at + len(frame.header)
        if first.slot.kind == "content":
            if prompt is not None and (self._inserted or not between[prompt:].strip()):
                return prompt, True
            own = first.slot.before
            return len(between) - (len(own) if between.endswith(own) else 0), False
        # A header that opens a thought (R1) does not stand before a call.
        stem = frame.header.partition("<think>")[0]
        if prompt is None and stem.strip() and stem in between:
            prompt = between.rfind(stem) + len(stem)
        if prompt is None:
            raise BadRow(
                f"it is not clear where turn {first.slot.turn + 1} begins in what the chat template"
                " writes. Name another, such as `chatml`, with tokenizer.chat_template"
            )
        return prompt, True

    def _marked_regions(self, example: Example, rendered: Rendered) -> list[Region]:
        """Returns what the template marks as generated, of the trained turns."""
        with rendering():
            [text], [spans] = self._render_with_spans(
                list(example.messages), example.tools, with_spans=True
            )
        assert text == rendered.text, "the same template and conversation"
        trained = set(example.trained_turns)
        regions = []
        for start, stop in spans:
            turns = {p.slot.turn for p in rendered.placed if p.start < stop and p.stop > start}
            if not self._ends.search(text[start:stop]):
                raise DataError(
                    f"{example.place}: the chat template ends {{% generation %}} before the"
                    " end-of-turn token, so the model would never learn to stop. Move"
                    " {% endgeneration %} behind it (tokenizer.chat_template)."
                )
            if turns and turns <= trained:
                regions.append(Region(start, stop))
            elif turns & trained:
                raise BadRow("the chat template marks several turns as one generated text")
        return regions

    def _escaped(self, rendered: Rendered, regions: list[Region]) -> tuple[str, list[Region]]:
        """Returns the text with the template's control tokens by their new names, and the regions
        in it. No border lies within a control token of the template."""
        ends = {end for placed in rendered.placed for end in (placed.start, placed.stop)}
        borders = {border for region in regions for border in (region.start, region.stop)}
        cuts = sorted({0, len(rendered.text)} | ends | borders)
        texts = iter([*rendered.placed, None])
        text = next(texts)
        parts: list[str] = []
        moved, place = {}, 0
        for start, stop in zip(cuts, [*cuts[1:], len(rendered.text)], strict=True):
            moved[start] = place
            if text and start >= text.stop:
                text = next(texts)
            piece = rendered.text[start:stop]
            is_users = text is not None and text.start <= start
            parts.append(self._quoted(piece) if is_users else self._escaping.escape(piece))
            place += len(parts[-1])
        return "".join(parts), [Region(moved[r.start], moved[r.stop], r.at_prompt) for r in regions]

    def _masked(self, text: str, regions: list[Region], encoding: Any) -> Encoded | str | BadRow:
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=bool)
        special = np.isin(ids, self.special_ids)
        wide = offsets[:, 1] > offsets[:, 0]
        for region in regions:
            touching = wide & (offsets[:, 1] > region.start) & (offsets[:, 0] < region.stop)
            # A special token may take the white space after it.
            ends = (offsets[:, 1] <= region.stop) | special
            inside = touching & ends & (offsets[:, 0] >= region.start)
            for position in np.flatnonzero(touching & ~inside):
                ahead = text[offsets[position, 0] : region.start]
                if region.at_prompt or not ends[position] or ahead.strip():
                    return "a token reaches over the border between prompt and response"
                inside[position] = True
            mask |= inside
            if region.start == 0 and not region.at_prompt:
                mask[0] = False  # of a plain text: predicted from nothing
        if not mask.any():
            return "no response token"
        if mask[0]:
            return BadRow(
                f"the chat template renders nothing before the response (all {len(mask)} tokens"
                " would carry loss), but its first token must be predicted from something. Name"
                " another with tokenizer.chat_template"
            )
        return ids, mask


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that the chat template writes after an assistant's text."""
    end = ChatEncoder(tokenizer).frame("chat template").end
    number: Any = tokenizer.convert_tokens_to_ids(end)
    return int(number)

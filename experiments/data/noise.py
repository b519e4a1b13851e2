"""Corpora made in memory of one domain of another: sources that differ in nothing but what was done to their training
text. Held-out splits stay as they are, a share of the documents for each source.

`data.corpus` names one as a call: `noised(levels=(0.0, 0.5))`, `redundant(share=0.8)`. Both are functions of the base
corpus and their options alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from experiments.config import DataConfig
from experiments.data.corpus import Corpus, DomainInfo, Key, Stream, open_corpus, select
from experiments.data.shards import END_OF_DOCUMENT, SPLITS, array_sha256
from moe.config import require

Noise = Literal["unigram", "uniform"]
PROSE = {"packaged": "legal"}  # the largest domain of English prose with clear rights; of other corpora the first one
WHERE = "data.corpus"
MAX_SHARE = 0.99  # a hundred times the rare source, in memory


@dataclass(frozen=True)
class Base:
    """One domain of a corpus; equal by content, so that what is made of it can be kept."""

    content_hash: str
    corpus: Corpus = field(compare=False)

    @property
    def info(self) -> DomainInfo:
        return self.corpus.info[0]

    def split(self, name: str) -> Stream:
        return self.corpus.stream(self.info.name, name)


def noised(base: str = "packaged", domain: str = "", levels: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9),
           noise: Noise = "unigram", seed: int = 0) -> Corpus:
    """Sources `clean`, `noise-30`, ...: disjoint shares of a domain's documents, nearly equal in tokens, training
    tokens of source k replaced with probability levels[k] (by what may be the same token). Ends of documents stay.

    Args:
      base: what `data.corpus` takes.
      domain: empty for `PROSE`.
      noise: `unigram`, draws from the source's own tokens; `uniform`, from the vocabulary but for the end of document.
      seed: of the shares and of the noise; the former depend on neither levels nor noise.

    Raises:
      ValueError: options out of range, an unknown domain, or one with fewer documents in a split than sources.
    """
    require(isinstance(levels, tuple | list) and len(levels) >= 2, f"{WHERE}: levels", levels, "two numbers or more")
    require(all(_number(level) and 0 <= level <= 1 for level in levels), f"{WHERE}: levels", levels, "shares, 0 to 1")
    names = [source_name(level) for level in levels]
    require(len(set(names)) == len(names), f"{WHERE}: levels", levels, "different ones, each names a source")
    require(noise in get_args(Noise), f"{WHERE}: noise", noise, f"one of {', '.join(get_args(Noise))}")
    _check_seed(seed)
    return _noised(_base(base, domain, len(levels)), tuple(map(float, levels)), noise, seed)


def redundant(base: str = "packaged", domain: str = "", share: float = 0.8, documents: int = 8,
              seed: int = 0) -> Corpus:
    """Sources `rare`, all but a few of a domain's training documents, and `common`, those few again and again, until
    they are `share` of the tokens of both (to a document). To train on tokens in these proportions, and not on equal
    numbers of each source, takes data.weights = (1 - share, share).

    Args:
      base: what `data.corpus` takes.
      domain: empty for `PROSE`.
      documents: different ones of `common`.

    Raises:
      ValueError: options out of range, an unknown domain, or documents that would not come twice.
    """
    limits = f"above 0, at most {MAX_SHARE}"
    require(_number(share) and 0 < share <= MAX_SHARE, f"{WHERE}: share", share, limits)
    _check_seed(seed)
    of = _base(base, domain, 2)
    there = of.info.documents["train"]
    require(_whole(documents) and 1 <= documents < there, f"{WHERE}: documents", documents,
            f"1 to {there - 1}: the train split of {of.info.name!r} has {there}, and some are for the rare source")
    return _redundant(of, float(share), documents, seed)


def source_name(level: float) -> str:
    """`clean`, or `noise-` and the percentage."""
    return "clean" if level == 0 else f"noise-{100 * level:g}"


@functools.lru_cache(maxsize=4)
def _noised(base: Base, levels: tuple[float, ...], noise: Noise, seed: int) -> Corpus:
    shares = {split: _shared(base.split(split), len(levels), np.random.default_rng([seed, i]))
              for i, split in enumerate(SPLITS)}
    sources, about = {}, {}
    for k, level in enumerate(levels):
        name, rng = source_name(level), np.random.default_rng([seed, len(SPLITS), k])
        sources[name] = {split: streams[k] for split, streams in shares.items()}
        sources[name]["train"] = _corrupted(sources[name]["train"], level, noise, base.corpus.vocab_size, rng)
        about[name] = f"share {k + 1} of {len(levels)} of {base.info.name}, {level:.0%} {noise} noise, seed {seed}"
    return _assembled(base, "noised", sources, about)


@functools.lru_cache(maxsize=2)
def _redundant(base: Base, share: float, documents: int, seed: int) -> Corpus:
    train = base.split("train")
    order = np.random.default_rng([seed, 0]).permutation(len(train.offsets) - 1)
    few, others = np.sort(order[:documents]), np.sort(order[documents:])
    sizes = np.diff(train.offsets)
    passes, rest = divmod(share / (1 - share) * sizes[others].sum(), sizes[few].sum())
    require(passes >= 2, f"{WHERE}: share", share,
            f"more, or fewer documents: {documents} have {sizes[few].sum()} tokens, all others "
            f"{sizes[others].sum()}, and to be redundant they must come twice")
    last = np.searchsorted(np.cumsum(sizes[few]), rest)
    repeated = np.concatenate([np.tile(few, int(passes)), few[:last]])
    rare, common = ({"train": taken(train, chosen)} for chosen in (others, repeated))
    for i, split in enumerate(SPLITS[1:], 1):
        rare[split], common[split] = _shared(base.split(split), 2, np.random.default_rng([seed, i]))
    about = {"rare": f"{len(others)} documents of {base.info.name}, seed {seed}",
             "common": f"{documents} documents of {base.info.name} {passes + rest / sizes[few].sum():.1f} times, "
                       f"seed {seed}"}
    return _assembled(base, "redundant", {"rare": rare, "common": common}, about)


def _base(name: str, domain: str, sources: int) -> Base:
    """A domain of the corpus; ValueError if it has not a document of each split for each source."""
    require(isinstance(name, str), f"{WHERE}: base", name, "what data.corpus takes")
    whole = open_corpus(DataConfig(corpus=name))
    domain = domain or PROSE.get(name, whole.domains[0])
    require(domain in whole.domains, f"{WHERE}: domain", domain, f"one of {', '.join(whole.domains)}")
    corpus = select(whole, (domain,), True)
    for split in SPLITS:
        there = corpus.info[0].documents[split]
        require(there >= sources, f"{WHERE}: domain", domain,
                f"one with {sources} documents in each split, one for each source: its {split} split has {there}")
    return Base(corpus.content_hash, corpus)


def taken(stream: Stream, documents: np.ndarray) -> Stream:
    """The documents of these numbers, in this order."""
    starts, ends = stream.offsets[documents], stream.offsets[documents + 1]
    tokens = np.concatenate([stream.tokens[start:end] for start, end in zip(starts, ends)])
    return Stream(tokens, np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64))


def _shared(stream: Stream, sources: int, rng: np.random.Generator) -> list[Stream]:
    """All documents, in random order each to the source with the fewest tokens so far."""
    sizes = np.diff(stream.offsets)
    owner, tokens = np.empty(len(sizes), np.int64), np.zeros(sources, np.int64)
    for document in rng.permutation(len(sizes)):
        owner[document] = np.argmin(tokens)
        tokens[owner[document]] += sizes[document]
    return [taken(stream, np.flatnonzero(owner == k)) for k in range(sources)]


def _corrupted(stream: Stream, level: float, noise: Noise, vocab_size: int, rng: np.random.Generator) -> Stream:
    text = np.flatnonzero(stream.tokens != END_OF_DOCUMENT)
    hit = text[rng.random(len(text)) < level]
    if noise == "unigram":
        drawn = stream.tokens[text[rng.integers(0, len(text), len(hit))]]
    else:
        drawn = rng.integers(END_OF_DOCUMENT + 1, vocab_size, len(hit))
    tokens = stream.tokens.copy()
    tokens[hit] = drawn
    return stream._replace(tokens=tokens)


def _assembled(base: Base, name: str, sources: Mapping[str, Mapping[str, Stream]], about: Mapping[str, str]) -> Corpus:
    """sources: source -> split -> stream; about: source -> what was done to it."""
    info = tuple(
        DomainInfo(
            source, base.info.licence, base.info.rights, f"{base.info.source}: {about[source]}",
            {split: len(stream.tokens) for split, stream in streams.items()},
            {split: len(stream.offsets) - 1 for split, stream in streams.items()},
            {split: (array_sha256(stream.tokens), array_sha256(stream.offsets)) for split, stream in streams.items()})
        for source, streams in sources.items())
    made: dict[Key, Stream] = {(source, split): stream for source, streams in sources.items()
                               for split, stream in streams.items()}
    return replace(base.corpus, name=f"{name} {base.corpus.name}", info=info, streams=made)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_seed(seed: int) -> None:
    require(_whole(seed) and seed >= 0, f"{WHERE}: seed", seed, "a whole number, 0 or more")

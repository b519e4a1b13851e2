"""Members of an archive to documents: one pure function per source, (name, bytes) pairs in, lists of paragraphs out.

Nothing is imported or installed, and nothing here depends on the interpreter's version: docstrings are dedented by
our own rule (`inspect.cleandoc` changed in Python 3.13).
"""

from __future__ import annotations

import ast
import bz2
import csv
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator

Members = Iterable[tuple[str, bytes]]

MAX_SOURCE_BYTES = 150_000  # larger modules are generated tables
MAX_CODE_BYTES = 60_000  # so that a split by module has enough modules
MIN_DOCSTRING_CHARS = 200
NEWS_PIECE_CHARS = 3_000


def paragraphs(text: str) -> list[str]:
    """Blocks between blank lines; trailing spaces of lines are dropped."""
    text = re.sub(r"[ \t\r]+\n", "\n", text.replace("\r\n", "\n").replace("\0", "")).strip("\n")
    return [block for block in re.split(r"\n{2,}", text) if block.strip()]


def pieces(lines: Iterable[str], min_chars: int) -> Iterator[list[str]]:
    """Runs of consecutive lines, each of at least `min_chars` characters except the last."""
    block: list[str] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= min_chars:
            yield block
            block, size = [], 0
    if block:
        yield block


def python_code(members: Members) -> Iterator[list[str]]:
    """Python modules without docstrings; a module is a document."""
    for _, raw in members:
        if len(raw) <= MAX_CODE_BYTES:
            source = raw.decode()
            yield paragraphs(strip_docstrings(source, _docstring_nodes(source)))


def docstrings(members: Members) -> Iterator[list[str]]:
    """Docstrings over 200 characters; a docstring is a document."""
    for _, raw in members:
        if len(raw) <= MAX_SOURCE_BYTES:
            for _, node in _docstring_nodes(raw.decode()):
                text = dedent_docstring(node.value.value)  # type: ignore[attr-defined]
                if len(text) > MIN_DOCSTRING_CHARS:
                    yield paragraphs(text)


def _docstring_nodes(source: str) -> list[tuple[bool, ast.Expr]]:
    """(is the only statement of its body, expression) of each docstring, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) \
                    and isinstance(first.value.value, str):
                found.append((len(node.body) == 1 and not isinstance(node, ast.Module), first))
    return sorted(found, key=lambda pair: pair[1].lineno)


def strip_docstrings(source: str, nodes: list[tuple[bool, ast.Expr]]) -> str:
    """The source without the lines of its docstrings; a body that held nothing else becomes `pass`."""
    lines = source.split("\n")
    for alone, node in reversed(nodes):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        if lines[first][: node.col_offset].strip():  # `def f(): "..."` on one line stays
            continue
        lines[first : last + 1] = [" " * node.col_offset + "pass"] if alone else []
    return "\n".join(lines)


def dedent_docstring(text: str) -> str:
    """PEP 257: the margin is the least indentation of all lines after the first."""
    first, *rest = text.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).strip("\n")


def licences(members: Members) -> Iterator[list[str]]:
    """Licence texts in English: the YAML header goes, files with a `language:` are skipped."""
    for _, raw in members:
        header = re.match(r"---\n(.*?)^---\n", text := raw.decode(), re.DOTALL | re.MULTILINE)
        if header and not re.search(r"^language:", header[1], re.MULTILINE):
            yield paragraphs(text[header.end() :])


def abc_tunes(members: Members) -> Iterator[list[str]]:
    """ABC files cut at the `X:` line of each tune; text before the first one is no music and goes."""
    for _, raw in members:
        for tune in re.split(r"^(?=X: *\d)", raw.decode().replace("\r\n", "\n"), flags=re.MULTILINE)[1:]:
            yield ["\n".join(paragraphs(tune))]


def po_catalogs(members: Members) -> Iterator[list[str]]:
    """Translations in gettext catalogs, one catalog a document, one message a paragraph; fuzzy, obsolete and
    untranslated ones are skipped."""
    for _, raw in members:
        entries = re.split(r"\n\s*\n", raw.decode().replace("\r\n", "\n"))
        messages = [text for entry in entries if not re.search(r"^#(~|,.*fuzzy)", entry, re.MULTILINE)
                    for text in _translations(entry)]
        yield [" ".join(text.split()) for text in messages]


def _translations(entry: str) -> list[str]:
    """The msgstr values of one catalog entry, without those that equal a source text."""
    fields: list[tuple[str, str]] = []
    for line in entry.split("\n"):
        match = re.match(r'(msg\w+(?:\[\d\])?)?\s*"(.*)"$', line)
        if match and (match[1] or fields):
            name, text = (match[1], "") if match[1] else fields.pop()
            fields.append((name, text + re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), match[2])))
    sources = {text for name, text in fields if name.startswith("msgid")}
    if sources <= {""}:  # the header
        return []
    return [text for name, text in fields if name.startswith("msgstr") and text.strip() and text not in sources]


def icd_categories(members: Members) -> Iterator[list[str]]:
    """The tabular list of diagnoses: a three-character category with all codes below it is a document."""
    for _, raw in members:
        for section in ET.fromstring(raw).iter("section"):
            for category in section.findall("diag"):
                yield [_diagnosis(diag) for diag in category.iter("diag")]


def _diagnosis(diag: ET.Element) -> str:
    """Code and name, then the notes that belong to this code, a line each."""
    lines = [f"{diag.findtext('name', '')} {diag.findtext('desc', '')}"]
    for child in diag:
        if child.tag not in ("name", "desc", "diag"):
            label = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", child.tag).capitalize()
            notes = [" ".join("".join(note.itertext()).split()) for note in child]
            lines += [f"  {label}: {note}" for note in notes if note]
    return "\n".join(lines)


def film_reviews(members: Members) -> Iterator[list[str]]:
    """All plots and reviews of one film are one document, so that no film is in two splits."""
    films: dict[str, list[str]] = {}
    for _, raw in members:
        for row in csv.DictReader(io.StringIO(bz2.decompress(raw).decode(), newline="")):
            films.setdefault(row["movie_name"], []).extend(paragraphs(row["text"]))
    yield from films.values()


def tagged_news(members: Members) -> Iterator[list[str]]:
    """Word/tag lines without tags and spaces. Articles are not marked: runs of lines stand in for them."""
    for _, raw in members:
        words = (re.findall(r"(\S+?)/[A-Za-z]+(?=\s|$)", line) for line in raw.decode().split("\n"))
        yield from pieces(("".join(line) for line in words if line), NEWS_PIECE_CHARS)


def review_lines(members: Members) -> Iterator[list[str]]:
    """One review a line."""
    for _, raw in members:
        yield from ([line.strip()] for line in raw.decode().split("\n") if line.strip())

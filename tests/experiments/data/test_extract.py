"""One small member per source, documents written out by hand."""

import bz2

from experiments.data import extract as ex

MODULE = b'''"""Module docstring."""
import re


class A:
    r"""Only \\d a docstring."""

    def f(self):
        "Short."
        return 1  # kept

    def g(self): "on the line"
'''


def test_python_code_loses_docstrings_and_still_parses():
    (document,) = ex.python_code([("a.py", MODULE)])
    text = "\n\n".join(document)
    compile(text, "a.py", "exec")
    assert text == ('import re\n\nclass A:\n\n    def f(self):\n        return 1  # kept\n\n'
                    '    def g(self): "on the line"')
    (only,) = ex.python_code([("b.py", b'class B:\n    """Nothing\n    else."""\n')])
    assert only == ["class B:\n    pass"]


def test_docstrings_over_200_characters_are_dedented():
    long = "Title.\n\n        Body " + "word " * 40 + "\n            deeper\n        "
    source = f'def f():\n    """{long}"""\n\ndef g():\n    """short"""\n'
    (document,) = ex.docstrings([("a.py", source.encode())])
    assert document == ["Title.", "Body " + "word " * 39 + "word\n    deeper"]


def test_licences_skip_header_and_other_languages():
    members = [("a", b"---\nkey: a\n---\n\nFree as in\nair.\n\nEnd."),
               ("b", b"---\nkey: b\nlanguage: fr\n---\n\nLibre."),
               ("c", b"no header")]
    assert list(ex.licences(members)) == [["Free as in\nair.", "End."]]


def test_abc_files_are_cut_into_tunes():
    raw = b"% preface\r\n\r\nX:1\r\nT:One\r\nK:G\r\nGAB|\r\n\r\nX: 2\r\nT:Two\r\n\r\n% note\r\nK:D\r\n"
    assert list(ex.abc_tunes([("a.abc", raw)])) == [["X:1\nT:One\nK:G\nGAB|"], ["X: 2\nT:Two\n% note\nK:D"]]


def test_po_catalogs_keep_real_translations():
    raw = b'''# head
msgid ""
msgstr ""
"Language: de\\n"

msgid "Yes"
msgstr "Ja"

#, fuzzy
msgid "No"
msgstr "Neun"

msgid "Same"
msgstr "Same"

msgid ""
"long "
"text"
msgstr ""
"langer \\"Text\\"\\n"
"weiter"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"
msgstr[1] "%d Tage"

msgid "empty"
msgstr ""

#~ msgid "old"
#~ msgstr "alt"
'''
    assert list(ex.po_catalogs([("django.po", raw)])) == [["Ja", 'langer "Text" weiter', "%d Tag", "%d Tage"]]


def test_icd_categories_hold_their_codes():
    raw = b"""<ICD10CM.tabular><chapter><name>1</name><section id="A"><desc>x</desc>
    <diag><name>A00</name><desc>Cholera</desc><excludes1><note>a  note</note></excludes1>
      <diag><name>A00.0</name><desc>Classical</desc><inclusionTerm><note>El Tor</note></inclusionTerm></diag></diag>
    <diag><name>A01</name><desc>Typhoid</desc></diag></section></chapter></ICD10CM.tabular>"""
    assert list(ex.icd_categories([("x.xml", raw)])) == [
        ["A00 Cholera\n  Excludes1: a note", "A00.0 Classical\n  Inclusion term: El Tor"], ["A01 Typhoid"]]


def test_reviews_of_one_film_are_one_document():
    raw = bz2.compress(b'category,text,movie_name,x\nplot,"One, two.",a,T\nfresh,Good.,b,T\nrotten,Bad.,a,T\n')
    assert list(ex.film_reviews([("x.csv.bz2", raw)])) == [["One, two.", "Bad."], ["Good."]]


def test_chinese_sources():
    tagged = "迈向/v  新/a  世纪/n  ——/w  \n\n２/m  ／/w  a/b/nx\n".encode()  # noqa: RUF001
    assert list(ex.tagged_news([("t", tagged)])) == [["迈向新世纪——", "２／a/b"]]  # noqa: RUF001
    assert list(ex.review_lines([("p", "好书\n\n 不错 \n".encode())])) == [["好书"], ["不错"]]
    assert list(ex.pieces(["ab", "cd", "e"], 3)) == [["ab", "cd"], ["e"]]

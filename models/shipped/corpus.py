"""Gather freely shippable English prose from unpacked Debian packages.

The packages, unpacked with `dpkg-deb -x` into one root folder (see `SOURCES.md` for the licences):
`python3.11-doc`, `wordnet-base`, `dict-jargon`, `dict-devil` and, for Newton's Opticks, `golang-1.19-src`.
"""

import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("python3.11-doc", "wordnet-base", "dict-jargon", "dict-devil", "golang-1.19-src")
_PYTHON_DOC = "usr/share/doc/python3.11/html/_sources"
_PYTHON_CHAPTERS = ("tutorial", "library", "howto", "faq", "reference", "using")
_WORDNET = "usr/share/wordnet"
_OPTICKS = "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
# Paragraphs with such words are left out: a demonstration should not start by insulting somebody.
_RUDE = re.compile(
    r"\b(?:fuck|shit|cunt|bitch|whore|slut|nigg|negro|rape|piss|penis|vagina|sexual|semen|masturbat|prostitut|faggot|"
    r"bastard|genital|copulat|coitus|incest|porn|orgasm|testic|jew|savage race|screw up|asshole|dildo|crap|turd)",
    re.IGNORECASE,
)


class Document(NamedTuple):
    """One text of the corpus."""

    source: str  # the Debian package it comes from
    text: str


class Sense(NamedTuple):
    """The first sense of an English word in WordNet."""

    word: str
    part: str  # n, v, a, s or r
    gloss: str
    examples: tuple[str, ...]
    num_uses: int  # how often WordNet's tagged texts use it


def unpack_packages(root: Path) -> None:
    """Download the corpus packages with apt and unpack them below `root`; needs no privileges.

    Raises:
        subprocess.CalledProcessError: apt or dpkg-deb failed, for instance without a network.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)


def documents(root: Path) -> list[Document]:
    """Return every text of the corpus, in an order that depends on the packages alone."""
    texts = list(_python_documents(root))
    texts += _dictionary_documents("dict-jargon", root / "usr/share/dictd/jargon.dict.dz")
    texts += _dictionary_documents("dict-devil", root / "usr/share/dictd/devil.dict.dz")
    texts.append(_opticks(root / _OPTICKS))
    texts += _wordnet_documents(wordnet_senses(root))
    return [
        Document(source, "\n".join(line for line in text.split("\n") if not _RUDE.search(line)))
        for source, text in texts
    ]


def _python_documents(root: Path) -> Iterator[Document]:
    for chapter in _PYTHON_CHAPTERS:
        for path in sorted((root / _PYTHON_DOC / chapter).glob("*.rst.txt")):
            text = "\n\n".join(rst_paragraphs(path.read_text(encoding="utf-8")))
            if len(text) > 400:
                yield Document("python3.11-doc", text)


def rst_paragraphs(rst: str) -> Iterator[str]:
    """Yield the prose of a reStructuredText file, one unwrapped paragraph at a time.

    Code, tables and directives are dropped, except that a documented name opens its description: `name: Return ...`.
    """
    name = ""
    in_code_below = -1  # indentation that a literal block must exceed, -1 outside of one
    for block in re.split(r"\n\s*\n", rst):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if in_code_below >= 0 and indent > in_code_below:
            continue
        in_code_below = -1
        directive = re.match(r"\s*\.\. ([\w:-]+?)::\s*(.*)", lines[0])
        if directive:
            kind, argument = directive.groups()
            if kind in ("function", "class", "method", "attribute", "data", "exception", "classmethod"):
                name = argument.split("(")[0].strip()
            elif kind not in ("note", "warning", "seealso", "versionchanged", "versionadded", "deprecated", "module"):
                in_code_below = indent
            continue
        text = _plain(" ".join(line.strip() for line in lines))
        if text.endswith("::") or text.endswith(" ::"):
            in_code_below = indent
            text = text.rstrip(": ") + ":"
        text = re.sub(r"^(\* |\d+\. |#\. )", "", text)
        if re.match(r"[A-Z\"'(]", text) and len(text.split()) >= 7 and "===" not in text and "---" not in text:
            yield f"{name}: {text}" if name else text
            name = ""


def _plain(text: str) -> str:
    text = re.sub(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|`([^`]+)`_?", lambda m: m[1] or m[2] or m[3], text)
    return re.sub(r"\s+", " ", text.replace("\\ ", "").replace("\\", "")).strip()


def _dictionary_documents(source: str, path: Path) -> list[Document]:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    start = text.find("ABASEMENT, n." if source == "dict-devil" else "\nabbrev")
    text = re.sub(r"[{}]", "", text[max(start, 0) :])
    entries: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"\s+", " ", paragraph).strip()
        if len(line.split()) >= 3 and "\ufffd" not in line:
            entries.append(line)
    return [Document(source, "\n\n".join(entries[i : i + 60])) for i in range(0, len(entries), 60)]


def _opticks(path: Path) -> Document:
    text = path.read_text(encoding="utf-8")
    text = text[text.index("My Design in this Book") :]
    text = text.split("End of the Project Gutenberg")[0]
    text = re.sub(r"\[(?:Illustration|Greek|Footnote)[^\]]*\]|_", "", text)
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return Document("golang-1.19-src", "\n\n".join(part for part in paragraphs if len(part.split()) >= 6))


def wordnet_senses(root: Path) -> list[Sense]:
    """Return the first sense of each single lower-case word of WordNet, the most used first."""
    folder = root / _WORDNET
    counts: dict[str, int] = {}
    parts = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, number, count = line.split()
        if number == "1":
            lemma, rest = key.split("%")
            counts[lemma + "/" + parts[rest[0]]] = int(count)
    senses: list[Sense] = []
    for part, name in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        glosses: dict[int, str] = {}
        for raw in (folder / f"data.{name}").read_bytes().split(b"\n"):
            if raw and not raw.startswith(b"  "):
                glosses[int(raw[:8])] = raw.decode("utf-8", "replace").split("| ", 1)[1].strip()
        for line in (folder / f"index.{name}").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if line.startswith("  ") or not re.fullmatch(r"[a-z]{2,14}", fields[0]):
                continue
            first = int(fields[6 + int(fields[3])])
            if _RUDE.search(fields[0] + " " + glosses[first]):
                continue
            gloss, *examples = re.split(r"; \"", glosses[first])
            quoted = tuple(example.split('"')[0] for example in examples)
            num_uses = counts.get(f"{fields[0]}/{part}", 0)
            senses.append(Sense(fields[0], part, gloss.split(";")[0].strip(), quoted, num_uses))
    return sorted(senses, key=lambda sense: (-sense.num_uses, sense.word, sense.part))


def _wordnet_documents(senses: list[Sense]) -> list[Document]:
    """Return the example sentences of WordNet, and its most used definitions, as paragraphs."""
    kinds = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
    lines: list[str] = []
    for sense in senses[:12000]:
        examples = [
            e[0].upper() + e[1:].rstrip(".?! ") + ("?" if "?" in e else ".")
            for e in sense.examples
            if len(e.split()) >= 3
        ]
        lines.append(f"{sense.word} ({kinds[sense.part]}): {sense.gloss}. {' '.join(examples)}".strip())
    return [Document("wordnet-base", "\n".join(lines[i : i + 40])) for i in range(0, len(lines), 40)]

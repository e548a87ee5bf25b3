"""The words of this project: docstrings, comments, messages, names and Markdown use the field's terms."""

import io
import re
import tokenize
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# Pattern -> what to say instead. The terms are defined in docs/glossary.md.
WORDS = {
    r"loud(er|ly)?": "explicit, with an error",
    r"laws?": "reference implementation",
    r"unheard": "not called, not observed",
    r"both[\s_]+ways": "bidirectional",
    r"mend(s|ed|ing)?": "fix",
    r"(?<!in\s)turn(s|ed|ing)?(?!\s((in)?to|back))": "rotate, rotation",
    r"arriv(e|es|ed|ing)": "loaded, as loaded",
    r"(?<!there\s)(is|are)\s+no(?!\slonger)": "is not a valid ..., has no ...",
    r"reach(es|ed|ing)?": "context length, target length",
    r"anew": "again",
    r"in\s+the\s+place\s+of": "instead of, in place of",
    r"(stands?(?!\sfor)|standing|stood)": "is, is given, is defined",
}
PATTERNS = {re.compile(rf"(?<![\w-]){pattern}(?![\w-])", re.IGNORECASE): instead for pattern, instead in WORDS.items()}
NAMES = re.compile(r"(?:^|_)(loud|law|mend(s|ed)?|turned|arrived)(?:_|$)", re.IGNORECASE)

CODE = re.compile(r"`[^`\n]*`")  # names are in backticks, and public names may be what they are
FIELDS = re.compile(r"\{[^{}\n]*\}")  # expressions in f-strings
TEXT = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))  # since Python 3.12


def checked_files():
    """Source and documentation; committed results are data."""
    source = [path for folder in ("rope_scaling", "eval", "recipes") for path in (ROOT / folder).rglob("*.py")]
    pages = [path for folder in ("rope_scaling", "eval", "recipes", "docs") for path in (ROOT / folder).rglob("*.md")]
    return sorted({*source, *pages, ROOT / "README.md"} - {*(ROOT / "docs" / "results").rglob("*.md")})


def words_in(text, first_line=1):
    """`(line, word, what to say instead)` for every listed word; a phrase may continue on the next line."""
    hidden = CODE.sub(lambda code: "`" * len(code.group()), text)
    for pattern, instead in PATTERNS.items():
        for match in pattern.finditer(hidden):
            yield first_line + text.count("\n", 0, match.start()), match.group(), instead


def words_in_python(source):
    """The same for comments, strings and names of a module. A string that is an identifier is a name."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in TEXT and not token.string.strip("\"'").isidentifier():
            yield from words_in(FIELDS.sub(lambda field: "`" * len(field.group()), token.string), token.start[0])
        elif token.type == tokenize.NAME and NAMES.search(token.string):
            yield token.start[0], token.string, "a term of docs/glossary.md"


@pytest.mark.parametrize("path", checked_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path):
    text, name = path.read_text(), path.relative_to(ROOT)
    words = words_in_python(text) if path.suffix == ".py" else words_in(text)
    report = [f"{name}:{line}: {word!r}; say: {instead}" for line, word, instead in sorted(words)]
    assert not report, "words that this project does not use:\n" + "\n".join(report)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# The law, and what arrives.\n", ["law", "arrives"]),
        ('"""It is no\n    method that `reach` mends."""\n', ["is no", "mends"]),
        ('raise ValueError(f"{reach} {name} attends both ways")\n', ["both ways"]),
        ("turned_off = None\n", ["turned_off"]),
        ('x = "There is no file", "in turn", "turn into", "no longer", "stands for", row["reach"], "reach"\n', []),
    ],
)
def test_the_lint_itself(text, words):
    assert sorted(" ".join(word.split()) for _, word, _ in words_in_python(text)) == sorted(words)

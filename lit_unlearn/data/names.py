"""Names as people read them: one way to find a name in a text, for every check and every list that goes by names.

Letters are compared as in Unicode's NFKC, whatever their case. Hyphens, dashes and underscores are spaces, several of
them are one, and all apostrophes are the same. Characters that nobody sees do not count, nor do accents of Latin and
Greek letters and vowel points of Hebrew and Arabic; marks of other scripts make another letter (ト and ド).

A name is found as whole words: "dog" is not found in "dogma". Scripts without spaces (Chinese, Japanese, Thai) have no
words to respect, and Korean attaches its particles to the end of a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

Span = tuple[int, int]
"""Where something stands in a text: its first character, and the one behind its last."""

APOSTROPHES = str.maketrans(
    dict.fromkeys("\u0060\u00b4\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\u02bd\u055a\ua78c", "'")
)
SPACES = {"\u2212", "\u30fb", "\uff65"}
"""What separates words besides spaces, dashes and underscores: the minus sign, and the dot between Japanese words."""
INVISIBLE = {"\u034f", "\u0640", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u3164", "\uffa0"}
for _first, _last in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF)):
    INVISIBLE |= set(map(chr, range(_first, _last + 1)))
"""Characters that nobody sees and Unicode's categories do not tell: fillers, elongation, variants of a form."""
WITHOUT_MARKS = ("LATIN", "GREEK", "HEBREW", "ARABIC")
"""Scripts whose marks do not count, as the names of their characters begin."""
WITHOUT_SPACES = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
    *("JAVANESE", "BALINESE", "SUNDANESE", "TAI", "NEW TAI", "CHAM"),
)
"""Scripts that are written without spaces."""

LONGEST_PART = 100
"""Most letters of a name that is looked for within others: no set shall take minutes to read."""


@dataclass(frozen=True)
class Reading:
    """A text as it is read.

    Attributes:
        letters: Its letters, in the form in which they are compared; a single space between words.
        places: Where each of them stands in the text.
        begins: Whether a word may begin at each of them.
        ends: Whether a word may end at each of them.
    """

    letters: str
    places: tuple[Span, ...]
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]

    def find(self, letters: str) -> Iterable[Span]:
        """Where the words ``letters``, read likewise, stand among ``self.letters``."""
        start = self.letters.find(letters) if letters else -1
        while start >= 0:
            end = start + len(letters)
            if self.begins[start] and self.ends[end - 1]:
                yield start, end
            start = self.letters.find(letters, start + 1)


@dataclass(frozen=True)
class _Sign:
    """A character with its marks: its letters as they are compared, its place, and whether it stands above the line."""

    letters: str
    place: Span
    raised: bool

    def is_of(self, scripts: tuple[str, ...]) -> bool:
        return unicodedata.name(self.letters[0], "").startswith(scripts)

    def begins_word(self, before: _Sign | None) -> bool:
        if before is None or self.raised != before.raised:
            return True
        is_inside = self.letters[0].isalnum() and before.letters[0].isalnum()
        return not is_inside or self.is_of(WITHOUT_SPACES) or before.is_of(WITHOUT_SPACES)

    def ends_word(self, behind: _Sign | None) -> bool:
        return behind is None or behind.begins_word(self) or self.is_of(("HANGUL",)) or behind.is_of(("HANGUL",))


@lru_cache(maxsize=1 << 15)
def read(text: str) -> Reading:
    """``text`` as it is read."""
    letters, places, begins, ends = [], [], [], []
    words = _words(text)
    for number, word in enumerate(words):
        joined = number and (word[0].is_of(WITHOUT_SPACES) or words[number - 1][-1].is_of(WITHOUT_SPACES))
        if number and not joined:
            letters.append(" ")
            places.append((words[number - 1][-1].place[1], word[0].place[0]))
            begins.append(False)
            ends.append(False)
        for place, sign in enumerate(word):
            before, behind = word[place - 1] if place else None, word[place + 1] if place + 1 < len(word) else None
            inside = len(sign.letters) - 1
            letters.append(sign.letters)
            places += [sign.place] * len(sign.letters)
            begins += [sign.begins_word(before), *[False] * inside]
            ends += [*[False] * inside, sign.ends_word(behind)]
    return Reading("".join(letters), tuple(places), tuple(begins), tuple(ends))


def name_key(name: str) -> str:
    """``name`` in the form in which concepts are looked up: as it is read, without its spaces."""
    return read(name).letters.replace(" ", "")


def find_names(text: str, names: Sequence[str]) -> list[Span]:
    """Where ``text`` has one of ``names``, from left to right; at one place in the order of ``names``."""
    reading = read(text)
    found = [(span[0], order, span) for order, name in enumerate(names) for span in reading.find(read(name).letters)]
    return [(reading.places[start][0], reading.places[end - 1][1]) for _, _, (start, end) in sorted(found)]


def replace_spans(text: str, spans: Iterable[Span], replacement: str) -> str:
    """``text`` with ``replacement`` in place of ``spans``, which ascend; of those that overlap the first counts."""
    parts, done = [], 0
    for start, end in spans:
        if start >= done:
            parts += [text[done:start], replacement]
            done = end
    return "".join([*parts, text[done:]])


def longer_names(names: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Of each owner of ``names``, the names of others that one of its own is a part of: of the dog, "hot dog"."""
    owners: dict[str, list[str]] = {}
    for owner, own in names.items():
        for name in own:
            owners.setdefault(read(name).letters, []).append(owner)
    lengths = sorted({len(letters) for letters in owners if len(letters) <= LONGEST_PART})
    found: dict[str, dict[str, None]] = {owner: {} for owner in names}
    for other, theirs in names.items():
        for name in theirs:
            reading = read(name)
            for start in (place for place, begins in enumerate(reading.begins) if begins):
                for end in (start + length for length in lengths if length < len(reading.letters)):
                    if end <= len(reading.ends) and reading.ends[end - 1]:
                        for owner in owners.get(reading.letters[start:end], ()):
                            if owner != other:
                                found[owner][name] = None
    return {owner: tuple(longer) for owner, longer in found.items()}


def _words(text: str) -> list[list[_Sign]]:
    """The signs of ``text``, in groups that spaces separate."""
    words: list[list[_Sign]] = [[]]
    start = end = 0  # of the sign at hand
    for place, character in enumerate(text):
        if _is_invisible(character):
            continue
        if end > start and _goes_on(text[start], character):
            end = place + 1
            continue
        _close(words, text[start:end], start)
        start, end = place, place + 1
    _close(words, text[start:end], start)
    return [word for word in words if word]


def _close(words: list[list[_Sign]], sign: str, start: int) -> None:
    if not sign:
        return
    if _is_space(sign[0]):
        words.append([])
    elif letters := _folded(sign):
        raised = unicodedata.decomposition(sign[0]).startswith(("<super>", "<sub>"))
        words[-1].append(_Sign(letters, (start, start + len(sign)), raised))


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) == "Cf" or character in INVISIBLE


def _is_space(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in ("Pd", "Pc") or character in SPACES


def _goes_on(first: str, character: str) -> bool:
    """Whether ``character`` belongs to the sign that ``first`` begins: a mark, or the rest of a Korean syllable."""
    if _is_space(first):
        return False
    mark = unicodedata.normalize("NFKD", character)[0]
    is_rest = "\u1160" <= character <= "\u11ff" and "\u1100" <= unicodedata.normalize("NFKD", first)[0] <= "\u11ff"
    return unicodedata.category(mark).startswith("M") or is_rest


@lru_cache(maxsize=1 << 12)
def _folded(sign: str) -> str:
    """A character and its marks as they are compared."""
    seen = "".join(character for character in sign if not _is_invisible(character)).translate(APOSTROPHES)
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", seen).casefold()).strip()
    if unicodedata.name(letters[:1] or " ", "").startswith(WITHOUT_MARKS):
        letters = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
    return letters

"""Finds names in texts as people read them; every check and list of names uses this module.

Letters are compared in Unicode's NFKC form, without regard to case. Hyphens, dashes and underscores count as spaces,
several spaces count as one, and all apostrophes are the same. Invisible characters are ignored, and so are accents of
Latin and Greek letters and vowel points of Hebrew and Arabic; in other scripts a mark makes another letter (ト, ド).

A name is found only as whole words: "dog" is not found in "dogma". Scripts without spaces (Chinese, Japanese, Thai)
have no word boundaries to check, and Korean attaches particles to the end of a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

Span = tuple[int, int]
"""Position in a text: index of the first character, and index after the last."""

APOSTROPHES = str.maketrans(
    dict.fromkeys("\u0060\u00b4\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\u02bd\u055a\ua78c", "'")
)
SPACES = {"\u2212", "\u30fb", "\uff65"}
"""What separates words besides spaces, dashes and underscores: the minus sign, and the dot between Japanese words."""
INVISIBLE = {"\u034f", "\u0640", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u3164", "\uffa0"}
for _first, _last in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF)):
    INVISIBLE |= set(map(chr, range(_first, _last + 1)))
"""Invisible characters that are not in Unicode's category Cf: fillers, elongation, variation selectors."""
WITHOUT_MARKS = ("LATIN", "GREEK", "HEBREW", "ARABIC")
"""Scripts whose marks are ignored, given as the beginning of their characters' Unicode names."""
WITHOUT_SPACES = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
    *("JAVANESE", "BALINESE", "SUNDANESE", "TAI", "NEW TAI", "CHAM"),
)
"""Scripts that are written without spaces."""

ARTICLES = ("a", "an", "the")

LONGEST_PART = 100
"""Longer names are not searched for in other names, so that no set takes minutes to read."""


@dataclass(frozen=True)
class Reading:
    """A text in the form in which it is compared.

    Attributes:
        letters: Its letters in the form in which they are compared, with a single space between words.
        places: Position of each letter in the text.
        begins: For each letter, whether a word may begin there.
        ends: For each letter, whether a word may end there.
    """

    letters: str
    places: tuple[Span, ...]
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]

    def find(self, letters: str) -> Iterable[Span]:
        """Positions in ``self.letters`` of the words ``letters``, which must be in the same form."""
        start = self.letters.find(letters) if letters else -1
        while start >= 0:
            end = start + len(letters)
            if self.begins[start] and self.ends[end - 1]:
                yield start, end
            start = self.letters.find(letters, start + 1)


@dataclass(frozen=True)
class _Sign:
    """A character with its marks: its letters as compared, its position, and whether it is super- or subscript."""

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
    """``text`` in the form in which it is compared."""
    return _read_ascii(text) if text.isascii() else _read_any(text)


def _read_ascii(text: str) -> Reading:
    """As ``_read_any`` in a tenth of the time: in ASCII every character is a sign, and none is of another script."""
    letters: list[str] = []
    places: list[Span] = []
    begins: list[bool] = []
    ends: list[bool] = []
    end = 0
    for word in re.finditer(r"[^\s_-]+", text):
        if letters:
            letters.append(" ")
            places.append((end, word.start()))
            begins.append(False)
            ends.append(False)
        start, end = word.span()
        letters.append(word[0].translate(APOSTROPHES).lower())
        places += [(place, place + 1) for place in range(start, end)]
        plain = [character.isalnum() for character in word[0]]
        borders = [True, *(not (one and other) for one, other in pairwise(plain)), True]
        begins += borders[:-1]
        ends += borders[1:]
    return Reading("".join(letters), tuple(places), tuple(begins), tuple(ends))


def _read_any(text: str) -> Reading:
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
    """``name`` in the form in which concepts are looked up: the letters of ``read``, without spaces."""
    return read(name).letters.replace(" ", "")


def bare(name: str) -> str:
    """``name`` without an article and without spaces around it: "a beach" is called "beach"."""
    words = name.split()
    return " ".join(words[1:] if len(words) > 1 and words[0].casefold() in ARTICLES else words)


def find_names(text: str, names: Sequence[str]) -> list[Span]:
    """Positions of all ``names`` in ``text``, from left to right; at the same start in the order of ``names``."""
    reading = read(text)
    found = [(span[0], order, span) for order, name in enumerate(names) for span in reading.find(read(name).letters)]
    return [(reading.places[start][0], reading.places[end - 1][1]) for _, _, (start, end) in sorted(found)]


def replace_spans(text: str, spans: Iterable[Span], replacement: str) -> str:
    """``text`` with ``replacement`` for each of the ascending ``spans``; of overlapping spans only the first counts."""
    parts, done = [], 0
    for start, end in spans:
        if start >= done:
            parts += [text[done:start], replacement]
            done = end
    return "".join([*parts, text[done:]])


def longer_names(names: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """For each owner of ``names``, the names of other owners that contain one of its names: for dog, "hot dog"."""
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
    """The signs of ``text``, grouped into words."""
    words: list[list[_Sign]] = [[]]
    start = end = 0  # of the current sign
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
    """Whether ``character`` continues the sign that begins with ``first``: a mark, or the rest of a Korean syllable."""
    if _is_space(first):
        return False
    mark = unicodedata.normalize("NFKD", character)[0]
    is_rest = "\u1160" <= character <= "\u11ff" and "\u1100" <= unicodedata.normalize("NFKD", first)[0] <= "\u11ff"
    return unicodedata.category(mark).startswith("M") or is_rest


@lru_cache(maxsize=1 << 12)
def _folded(sign: str) -> str:
    """A character and its marks in the form in which they are compared."""
    seen = "".join(character for character in sign if not _is_invisible(character))
    seen = unicodedata.normalize("NFC", seen).translate(APOSTROPHES)  # some Greek accents are stored as apostrophes
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", seen).casefold()).strip()
    if unicodedata.name(letters[:1] or " ", "").startswith(WITHOUT_MARKS):
        letters = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
    return letters

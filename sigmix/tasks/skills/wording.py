"""Words: first letters, order, spelling, plurals, opposites.

Every first letter and every position is as likely as any other. Tasks such as "how many letters" or "the last letter"
are left out: a constant reply wins them.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict

from sigmix.tasks.graders import exact, wrong_candidates
from sigmix.tasks.skills.base import ONE_WORD, Item, skill
from sigmix.tasks.skills.words import COMMON, OPPOSITES, PLURALS

wording = functools.partial(skill, domain="words", grader=exact)

BY_LETTER: dict[str, list[str]] = defaultdict(list)
for _word in dict.fromkeys(COMMON):
    BY_LETTER[_word[0]].append(_word)
LETTERS = sorted(letter for letter, words in BY_LETTER.items() if len(words) >= 6)


def pick(rng: random.Random, count: int) -> list[str]:
    """Draw words with different first letters, each letter as likely as any other."""
    return [rng.choice(BY_LETTER[letter]) for letter in rng.sample(LETTERS, count)]


@wording("first-letter", description="Give the first letter of a word.")
def first_letter(rng: random.Random) -> Item:
    (word,) = pick(rng, 1)
    a, b, last = word[0], word[1], word[-1]
    wrong = [word, " ".join(word), f"{a}{b}", f"{a} or {b}", f"{a} is the last letter", *([last] * (last != a))]
    return Item(f'What is the first letter of the word "{word}"? Answer with one letter.', a, wrong, key=word)


@wording("alphabetical", description="Say which of three words comes first in a dictionary.")
def alphabetical(rng: random.Random) -> Item:
    words = pick(rng, 3)
    gold = min(words)
    wrong = wrong_candidates(words, gold, f"{max(words)} comes before {gold}")
    question = f"Which word comes first in alphabetical order: {', '.join(words)}? {ONE_WORD}"
    return Item(question, gold, wrong, key=" ".join(sorted(words)))


@wording("longest-word", description="Say which of three words is the longest.")
def longest_word(rng: random.Random) -> Item:
    while True:
        words = pick(rng, 3)
        short, middle, gold = sorted(words, key=len)
        if len(gold) > len(middle):
            break
    wrong = wrong_candidates(words, gold, f"{short} is longer than {gold}")
    question = f"Which of these words is the longest: {', '.join(words)}? {ONE_WORD}"
    return Item(question, gold, wrong, key=" ".join(sorted(words)))


@wording("spell", max_new_tokens=24, description="Spell a word with hyphens between its letters.")
def spell(rng: random.Random) -> Item:
    (word,) = pick(rng, 1)
    gold = "-".join(word)
    wrong = [word, " ".join(word), gold + "-", "d-o-g", gold[:-2], f"{word}: {gold}", word[::-1]]
    return Item(f'Spell the word "{word}" with a hyphen between the letters, like d-o-g.', gold, wrong, key=word)


@wording("reverse-words", max_new_tokens=16, description="Put three words in reverse order.")
def reverse_words(rng: random.Random) -> Item:
    a, b, c = words = pick(rng, 3)
    wrong = [
        " ".join(words), f"{c} {a} {b}", f"{b} {c} {a}", f"{c} {b} {a} {c}", f"{a} {b} {c} {b} {a}", c,
        f"{c}, {b}, {a}", " ".join(word[::-1] for word in words),
    ]  # fmt: skip
    return Item(f"Write these three words in reverse order: {a} {b} {c}", f"{c} {b} {a}", wrong)


@wording("repeat-last-word", description="Repeat the last word of a short list.")
def repeat_last_word(rng: random.Random) -> Item:
    words = pick(rng, rng.randint(3, 6))
    gold = words[-1]
    question = f"Here is a list of words: {' '.join(words)}. What is the last word of the list? {ONE_WORD}"
    return Item(question, gold, wrong_candidates(words, gold, f"{gold} is the first word"))


@wording(
    "uppercase", grader=functools.partial(exact, casefold=False), description="Write two words in capital letters."
)
def uppercase(rng: random.Random) -> Item:
    a, b = pick(rng, 2)
    text = f"{a} {b}"
    wrong = [text, text.title(), a.upper(), f"{a.upper()} {b}", f"{text.upper()} {text}"]
    return Item(f"Write in capital letters: {text}", text.upper(), wrong)


@wording("plural", description="Give a noun's plural.")
def plural(rng: random.Random) -> Item:
    word = rng.choice(list(PLURALS))
    gold = PLURALS[word]
    naive = [word + ending for ending in ("s", "es", "ies") if word + ending != gold]
    wrong = [word, *naive, f"{word} {gold}", f"{word}/{gold}"]
    return Item(f'What is the plural of "{word}"? {ONE_WORD}', gold, wrong, key=word)


def _opposite_table() -> list[tuple[str, str, list[str]]]:
    """Return (word, usual opposite, all listed opposites), both ways; a word in several pairs has those of all."""
    table: dict[str, list[str]] = defaultdict(list)
    for left, right, lefts, rights in OPPOSITES:
        table[left] += [word for word in rights if word not in table[left]]
        table[right] += [word for word in lefts if word not in table[right]]
    return [(word, others[0], others) for word, others in table.items()]


def _groups() -> dict[str, str]:
    """Map each word to its connected group of pairs: "old" joins young/old and new/old, so all go to one split."""
    group: dict[str, str] = {}
    for word, _, others in _OPPOSITE_ENTRIES:
        joined = sorted({group.get(member, member) for member in (word, *others)})
        for member in {word, *others, *(key for key, value in group.items() if value in joined)}:
            group[member] = joined[0]
    return group


_OPPOSITE_ENTRIES = _opposite_table()
_GROUPS = _groups()


@wording("opposite", description="Give a word's opposite, from a list of common pairs.")
def opposite(rng: random.Random) -> Item:
    word, gold, others = rng.choice(_OPPOSITE_ENTRIES)
    wrong = [word, f"not {word}", f"{word} and {gold}", f"{gold} or {word}", f"{word} {gold}"]
    wrong += [prefix + word for prefix in ("un", "non-") if prefix + word not in others]
    accept = {"accept": [other for other in others if other != gold]}
    return Item(f'What is the opposite of "{word}"? {ONE_WORD}', gold, wrong, accept, key=_GROUPS[word])

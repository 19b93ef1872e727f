"""Words: first letters, order, spelling, plurals, opposites. Every first letter and every position is as likely as any
other, because "how many letters" and "the last letter" are won by a constant reply."""

from __future__ import annotations

import random
from collections import defaultdict

from sigmix.tasks.base import Score
from sigmix.tasks.graders import exact
from sigmix.tasks.skills.base import Item, skill
from sigmix.tasks.skills.words import COMMON, OPPOSITES, PLURALS

BY_LETTER: dict[str, list[str]] = defaultdict(list)


for _word in dict.fromkeys(COMMON):
    BY_LETTER[_word[0]].append(_word)


LETTERS = sorted(letter for letter, words in BY_LETTER.items() if len(words) >= 6)


ONE_WORD = "Answer with one word."


def exact_case(reply: str, gold: str) -> Score:
    """`exact`, but upper and lower case differ."""
    return exact(reply, gold, casefold=False)


def pick(rng: random.Random, count: int) -> list[str]:
    """``count`` words with different first letters, each letter as likely as any other."""
    return [rng.choice(BY_LETTER[letter]) for letter in rng.sample(LETTERS, count)]


def _candidates(words: list[str], gold: str, false_sentence: str) -> list[str]:
    others = [word for word in words if word != gold]
    return [
        *others,
        " ".join(words),
        ", ".join(words),
        " or ".join(words),
        false_sentence,
        f"not {gold} but {others[0]}",
    ]


@skill("first-letter", domain="words", verify=exact, description="Give the first letter of a word.")
def first_letter(rng: random.Random) -> Item:
    word = pick(rng, 1)[0]
    last = [word[-1]] if word[-1] != word[0] else []
    return Item(
        f'What is the first letter of the word "{word}"? Answer with one letter.',
        word[0],
        [
            word,
            " ".join(word),
            f"{word[0]}{word[1]}",
            f"{word[0]} or {word[1]}",
            f"{word[0]} is the last letter",
            *last,
        ],
        key=word,
    )


@skill(
    "alphabetical", domain="words", verify=exact, description="Say which of three words comes first in a dictionary."
)
def alphabetical(rng: random.Random) -> Item:
    words = pick(rng, 3)
    gold = min(words)
    return Item(
        f"Which word comes first in alphabetical order: {', '.join(words)}? {ONE_WORD}",
        gold,
        _candidates(words, gold, f"{max(words)} comes before {gold}"),
        key=" ".join(sorted(words)),
    )


@skill(
    "spell",
    domain="words",
    verify=exact,
    max_new_tokens=24,
    description="Spell a word with hyphens between its letters.",
)
def spell(rng: random.Random) -> Item:
    word = pick(rng, 1)[0]
    gold = "-".join(word)
    return Item(
        f'Spell the word "{word}" with a hyphen between the letters, like d-o-g.',
        gold,
        [word, " ".join(word), gold + "-", "d-o-g", gold[:-2], f"{word}: {gold}", "".join(reversed(word))],
        key=word,
    )


@skill(
    "reverse-words", domain="words", verify=exact, max_new_tokens=16, description="Put three words in reverse order."
)
def reverse_words(rng: random.Random) -> Item:
    words = pick(rng, 3)
    a, b, c = words
    return Item(
        f"Write these three words in reverse order: {a} {b} {c}",
        f"{c} {b} {a}",
        [
            " ".join(words),
            f"{c} {a} {b}",
            f"{b} {c} {a}",
            f"{c} {b} {a} {c}",
            f"{a} {b} {c} {b} {a}",
            c,
            f"{c}, {b}, {a}",
            " ".join(word[::-1] for word in words),
        ],
    )


@skill("repeat-last-word", domain="words", verify=exact, description="Repeat the last word of a short list.")
def repeat_last_word(rng: random.Random) -> Item:
    words = pick(rng, rng.randint(3, 6))
    gold = words[-1]
    return Item(
        f"Here is a list of words: {' '.join(words)}. What is the last word of the list? {ONE_WORD}",
        gold,
        _candidates(words, gold, f"{gold} is the first word"),
    )


@skill("longest-word", domain="words", verify=exact, description="Say which of three words is the longest.")
def longest_word(rng: random.Random) -> Item:
    while True:
        words = pick(rng, 3)
        ranked = sorted(words, key=len)
        if len(ranked[2]) > len(ranked[1]):
            break
    gold = ranked[2]
    return Item(
        f"Which of these words is the longest: {', '.join(words)}? {ONE_WORD}",
        gold,
        _candidates(words, gold, f"{ranked[0]} is longer than {gold}"),
        key=" ".join(sorted(words)),
    )


@skill("uppercase", domain="words", verify=exact_case, description="Write two words in capital letters.")
def uppercase(rng: random.Random) -> Item:
    words = pick(rng, 2)
    text = " ".join(words)
    return Item(
        f"Write in capital letters: {text}",
        text.upper(),
        [text, text.title(), words[0].upper(), f"{words[0].upper()} {words[1]}", text.upper() + " " + text],
    )


@skill("plural", domain="words", verify=exact, description="Give a noun's plural.")
def plural(rng: random.Random) -> Item:
    word = rng.choice(list(PLURALS))
    gold = PLURALS[word]
    naive = [word + ending for ending in ("s", "es", "ies") if word + ending != gold]
    return Item(
        f'What is the plural of "{word}"? {ONE_WORD}',
        gold,
        [word, *naive, f"{word} {gold}", f"{word}/{gold}"],
        key=word,
    )


def _opposite_table() -> list[tuple[str, str, list[str]]]:
    """(word, usual opposite, all opposites that the list knows), both ways; a word in several pairs gets them all."""
    table: dict[str, list[str]] = defaultdict(list)
    for left, right, lefts, rights in OPPOSITES:
        table[left] += [word for word in rights if word not in table[left]]
        table[right] += [word for word in lefts if word not in table[right]]
    return [(word, others[0], others) for word, others in table.items()]


_OPPOSITE_ENTRIES = _opposite_table()


def _groups() -> dict[str, str]:
    """Word -> name of its connected group of pairs: "old" ties young/old to new/old, so all go to one split."""
    group: dict[str, str] = {}
    for word, _, others in _OPPOSITE_ENTRIES:
        known = sorted({group.get(member, member) for member in (word, *others)})
        for member in {word, *others, *(key for key, value in group.items() if value in known)}:
            group[member] = known[0]
    return group


_GROUPS = _groups()


@skill("opposite", domain="words", verify=exact, description="Give a word's opposite, from a list of common pairs.")
def opposite(rng: random.Random) -> Item:
    word, gold, others = rng.choice(_OPPOSITE_ENTRIES)
    accept = [other for other in others if other != gold]
    wrong = [word, f"not {word}", f"{word} and {gold}", f"{gold} or {word}", f"{word} {gold}"]
    wrong += [prefix + word for prefix in ("un", "non-") if prefix + word not in others]
    return Item(f'What is the opposite of "{word}"? {ONE_WORD}', gold, wrong, {"accept": accept}, key=_GROUPS[word])

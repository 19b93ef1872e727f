"""Everyday requests that no bundled expert is for: the class "other" of the dispatch strategies. Written for sigmix."""

from __future__ import annotations

import random

from sigmix.tasks.base import SPLITS, Split

# template families go to one split each, so that validation and test hold wordings that were never trained on
TEMPLATES: dict[Split, list[str]] = {
    "train": [
        "Explain {thing} to a child.",
        "Write a short poem about {thing}.",
        "What is the capital of {country}?",
        "Give me three tips for {activity}.",
        "Translate into French: I like {thing}.",
        "Who invented {invention}?",
        "Tell me a joke about {thing}.",
        "Why do people enjoy {activity}?",
        "Summarise the history of {country} in two sentences.",
        "What should I cook with {food}?",
        "How does {invention} work?",
        "Write an email to my boss about {activity}.",
        "Describe {country} in one paragraph.",
        "What are the health benefits of {food}?",
    ],
    "validation": [
        "Can you recommend a book about {thing}?",
        "What language do people speak in {country}?",
        "Plan a weekend of {activity} for me.",
        "Is {food} good for breakfast?",
        "When was {invention} invented?",
    ],
    "test": [
        "Write a story that begins with {thing}.",
        "Which currency is used in {country}?",
        "How can I get better at {activity}?",
        "Suggest a dessert with {food}.",
        "What would the world be like without {invention}?",
        "Hello! How are you today?",
    ],
}
FILLERS: dict[str, list[str]] = {
    "thing": "the sea|the moon|winter|a lost dog|old trains|friendship|the rain|a lighthouse|bees|dreams|the desert|"
    "volcanoes|gravity|the night sky|a small village|snow|music|clouds|an old clock|rivers".split("|"),
    "country": "Portugal|Norway|Vietnam|Canada|Morocco|Chile|Greece|Finland|Nepal|Mexico|Iceland|Poland|Ghana|Jordan|"
    "Cuba|Latvia|Thailand|Turkey|Sweden|Bolivia".split("|"),
    "activity": "running|learning the guitar|gardening|chess|hiking|painting|swimming|public speaking|baking bread|"
    "photography|sailing|yoga|knitting|cycling|learning Spanish|saving money|fishing|writing letters|dancing".split(
        "|"
    ),
    "food": "lentils|eggs|spinach|rice|mushrooms|tofu|apples|pumpkin|salmon|beans|carrots|yogurt|chickpeas|potatoes|"
    "tomatoes|noodles|oats|cheese|aubergines|walnuts".split("|"),
    "invention": "the telephone|the compass|the steam engine|the printing press|the bicycle|the microscope|radio|"
    "the light bulb|the refrigerator|the camera|the battery|paper|the zipper|the helicopter|the elevator".split("|"),
}


CODE_TEMPLATES = (
    "Write a {language} function that {does}.",
    "How do I write a program in {language} that {does}?",
    "Debug this {language} code, which should be one that {does}.",
    "Show me a short {language} script that {does}, with comments.",
)
LANGUAGES = ("Python", "JavaScript", "Rust", "C", "Go", "Java", "SQL", "Bash")
PROGRAMS = (
    "reverses a linked list", "reads a CSV file", "counts the words of a text", "sorts a list of names",
    "checks whether a string is a palindrome", "downloads a web page", "computes Fibonacci numbers",
    "parses a date", "removes duplicates", "finds the shortest path in a graph", "merges two dictionaries",
    "validates an email address",
)  # fmt: skip


def code_requests(n: int, seed: int = 0) -> list[str]:
    """Up to n distinct requests for programs: a domain that neither training nor validation of any strategy has."""
    every = [t.format(language=name, does=what) for t in CODE_TEMPLATES for name in LANGUAGES for what in PROGRAMS]
    random.Random(f"code {seed}").shuffle(every)
    return every[:n]


def everyday(split: Split, n: int, seed: int = 0) -> list[str]:
    """Up to n distinct requests of a split, the same for the same arguments."""
    assert split in SPLITS
    every = [
        template.format(**{key: filler})
        for template in TEMPLATES[split]
        for key, fillers in FILLERS.items()
        if "{" + key + "}" in template
        for filler in fillers
    ]
    every += [template for template in TEMPLATES[split] if "{" not in template]
    random.Random(f"everyday {split} {seed}").shuffle(every)
    return every[:n]

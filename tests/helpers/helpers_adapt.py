"""Banks of tiny experts with domains, and an engine over one."""

from __future__ import annotations

from dataclasses import replace

from helpers_engine import expert

from sigmix.adapt import OTHER, request_statistics
from sigmix.engine import Engine

DOMAINS = {"adder": "arithmetic", "finder": "reading"}


def bank_of(tiny, **domains):
    """{name: expert} on the tiny Llama; values are domains."""
    experts = {}
    for seed, (name, domain) in enumerate((domains or DOMAINS).items()):
        one = expert(big(tiny), name, seed)
        experts[name] = one.with_meta(domain=domain, description=f"Does {name} things.", task=None)
    return experts


def big(tiny, **changes):
    """A tiny Llama whose context holds the templates, which have a token for each letter."""
    return tiny("llama", max_position_embeddings=4096, **changes)


def engine_of(tiny, tokenizer, bank=None):
    return Engine(big(tiny), tokenizer, bank_of(tiny) if bank is None else bank)


def requests_of(label: str, start: int, count: int) -> list[str]:
    """Requests with letters that give the label away, also to a random model."""
    forms = {
        "arithmetic": "{0} + {1} = 7 - {0} + {1}", "reading": "who zoo who zzz is {0} zzz who", "words": "@@ {0} @#@",
        OTHER: "Tell me a story about the fox number {0}.",
    }  # fmt: skip
    return [forms[label].format(number, number + 3) for number in range(start, start + count)]


def routed(engine: Engine, bank=None) -> dict:
    """The bank's experts with statistics of `requests_of` their domains."""
    return {
        name: replace(
            one,
            requests=request_statistics(
                engine, requests_of(one.meta["domain"], 0, 40), requests_of(one.meta["domain"], 100, 20)
            ),
        )
        for name, one in (engine.bank if bank is None else bank).items()
    }

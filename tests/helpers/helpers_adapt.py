"""Banks of tiny experts with domains, and an engine over one."""

from __future__ import annotations

from helpers_engine import expert

from sigmix.engine import Engine

DOMAINS = {"adder": "arithmetic", "finder": "reading"}


def bank_of(tiny, **domains):
    """{name: expert} on the tiny Llama; values are domains."""
    made = {}
    for seed, (name, domain) in enumerate((domains or DOMAINS).items()):
        one = expert(big(tiny), name, seed)
        made[name] = one.with_meta(domain=domain, description=f"Does {name} things.", task=None)
    return made


def big(tiny, **changes):
    """A tiny Llama whose context holds the templates, which have a token for each letter."""
    return tiny("llama", max_position_embeddings=4096, **changes)


def engine_of(tiny, tokenizer, bank=None):
    return Engine(big(tiny), tokenizer, bank_of(tiny) if bank is None else bank)

from __future__ import annotations


def add(app) -> None:
    pass

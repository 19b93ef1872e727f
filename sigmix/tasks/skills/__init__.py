"""Small generated tasks that a 135M-parameter model can learn: short prompts and answers, strict graders.

Each is a function from a seeded `random.Random` to an `Item`; `skill` turns it into a registered task. Importing this
package registers all of them.
"""

from __future__ import annotations

from sigmix.tasks.skills import arithmetic, calendar, formats, logic, passages, quantities, reading, wording

__all__ = ["arithmetic", "calendar", "formats", "logic", "passages", "quantities", "reading", "wording"]

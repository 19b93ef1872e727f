"""The text benchmarks of the Transformer² paper and their neighbours: GSM8K, MATH, SVAMP, ARC, OpenBookQA, BoolQ.

Hub ids are those of the publishers (MATH: EleutherAI's copy). The programs that MBPP and HumanEval need are in
`programs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from sigmix.errors import ConfigError
from sigmix.tasks.base import Sample, Score, content_id
from sigmix.tasks.benchmark import BenchmarkTask
from sigmix.tasks.choices import relabel, score_choice, score_yes_no, wrong_choices
from sigmix.tasks.numbers import boxed, math_equal, parse_number, score_final, strict_number
from sigmix.tasks.registry import register
from sigmix.tasks.rows import Row

REASON = 'Think step by step. End with "#### " and the number.'
ONLY = "Answer with the number only."


class WordProblemTask(BenchmarkTask):
    """A story with a number for an answer.

    Args:
        data_dir: local data, or None for the hub.
        style: "final" lets the model reason and reads the final number; "strict" asks for the number alone.
    """

    domain = "arithmetic"

    def __init__(self, data_dir: Path | None = None, style: str = "final") -> None:
        super().__init__(data_dir)
        if style not in ("final", "strict"):
            raise ConfigError(f"option style must be final or strict, not {style!r}")
        self.strict = style == "strict"
        self.max_new_tokens = 12 if self.strict else 320

    def _make(self, row: Row, question: str, answer: str, **meta: Any) -> Sample:
        value = parse_number(answer)
        if value is None:
            raise row.bad(f"the answer {answer!r} is not a number")
        plain = str(value.numerator) if value.denominator == 1 else str(float(value))
        return Sample.make(
            f"{question.strip()}\n{ONLY if self.strict else REASON}", plain, key=content_id(question), **meta
        )

    def score(self, sample: Sample, reply: str) -> Score:
        return strict_number(reply, sample.gold) if self.strict else score_final(reply, sample.gold)

    def wrong_replies(self, sample: Sample) -> list[str]:
        gold, other = sample.gold, str(float(sample.gold) + 1).removesuffix(".0")
        return [
            *super().wrong_replies(sample),
            other,
            f"{gold}\n#### {other}",
            f"#### {gold}\n#### {other}",
            f"The answer is {other}, not {gold}.",
            f"{other} or {gold}",
            f"{gold} or {other}",
            f"The answer is {other} or {gold}.",
            f"The answer is not {gold}.",
            f"It cannot be {gold}; it is {other}.",
            rf"\boxed{{{other}}} and then \boxed{{{gold}}}",
            f"{gold}7",
            str(1 - 2 * float(gold)),
        ]


@register("gsm8k")
class GSM8K(WordProblemTask):
    """Cobbe et al. 2021, arXiv:2110.14168. ``meta["solution"]`` is the worked solution."""

    description = "Grade-school word problems (GSM8K)."
    license = "MIT"
    files: ClassVar = {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
    hub, hub_configs = "openai/gsm8k", ("main",)

    def sample(self, row: Row) -> Sample:
        solution, mark, answer = row.get("answer", kind=str).partition("####")
        if not mark:
            raise row.bad("the answer has no ####")
        return self._make(row, row.get("question", kind=str), answer.strip(), solution=solution.strip())


@register("svamp")
class SVAMP(WordProblemTask):
    """Patel et al. 2021, arXiv:2103.07191. Its local file has no splits; many of its stories vary one another."""

    description = "Short word problems with one operation, made to defeat shallow reading (SVAMP)."
    license = "MIT"
    files: ClassVar = {"all": "svamp/SVAMP.jsonl"}
    hub = "ChilleD/SVAMP"

    def sample(self, row: Row) -> Sample:
        body = row.get("Body", kind=str).strip()
        answer = str(row.get("Answer", kind=(int, float, str))).removesuffix(".0")
        return self._make(row, f"{body}{'' if body[-1] in '.?!,' else '.'} {row.get('Question', kind=str)}", answer)


@register("math")
class Math(BenchmarkTask):
    """Hendrycks et al. 2021, arXiv:2103.03874. Answers are compared by math-verify."""

    domain = "math"
    description = "Competition mathematics (MATH)."
    license = "MIT"
    max_new_tokens = 512
    files: ClassVar = {"train": "math/train.jsonl", "test": "math/test.jsonl"}
    hub = "EleutherAI/hendrycks_math"
    hub_configs = (
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    )

    def sample(self, row: Row) -> Sample:
        solution = row.get("solution", kind=str)
        answers = boxed(solution)
        if not answers or not answers[-1].strip():
            raise row.bad("the solution has no \\boxed answer")
        prompt = f"{row.get('problem', kind=str).strip()}\nThink step by step. Put the final answer in \\boxed{{}}."
        return Sample.make(prompt, rf"\boxed{{{answers[-1].strip()}}}", answer=answers[-1].strip(), solution=solution)

    def score(self, sample: Sample, reply: str) -> Score:
        return math_equal(reply, sample.meta["answer"])

    def wrong_replies(self, sample: Sample) -> list[str]:
        other = r"\boxed{-98765.4321}"
        answer = sample.meta["answer"]
        # no "It is not \boxed{...}" here: a boxed answer is what the task asks for, whatever stands around it
        return [
            sample.prompt,
            f"It is not {answer}, or is it?",
            other,
            f"{sample.gold} or {other}",
            f"{answer} but {other}",
            r"\boxed{}",
            rf"\boxed{{{answer}",
        ]


class ChoiceTask(BenchmarkTask):
    """A question with labelled choices. The prompt always shows letters; data labelled 1 to 4 are relabelled."""

    max_new_tokens = 8
    domain = "knowledge"

    def sample(self, row: Row) -> Sample:
        stem, labels, texts = self._parts(row)
        try:
            shown = relabel(labels)
        except ValueError as error:
            raise row.bad(str(error)) from error
        key = str(row.get("answerKey", kind=(str, int))).strip()
        if key not in shown:
            raise row.bad(f"answerKey {key!r} is none of the labels {', '.join(labels)}")
        choices = {shown[label]: text for label, text in zip(labels, texts, strict=True)}
        lines = "\n".join(f"{label}. {text}" for label, text in choices.items())
        return Sample.make(f"{stem}\n{lines}\nAnswer with the letter only.", shown[key], choices=choices)

    def _parts(self, row: Row) -> tuple[str, list[str], list[str]]:
        question = row.get("question", "question_stem", kind=(dict, str))
        if isinstance(question, dict):  # the publishers' own files
            inner = Row(question, row.where)
            pairs = [Row(choice, row.where) for choice in inner.get("choices", kind=list)]
            return (
                inner.get("stem", kind=str),
                [str(pair.get("label")) for pair in pairs],
                [str(pair.get("text")) for pair in pairs],
            )
        choices = Row(row.get("choices", kind=dict), row.where)  # the hub's layout
        labels, texts = choices.get("label", kind=list), choices.get("text", kind=list)
        if len(labels) != len(texts):
            raise row.bad(f"{len(labels)} labels for {len(texts)} choices")
        return row.get("question_stem", "question", kind=str), [str(label) for label in labels], [str(t) for t in texts]

    def score(self, sample: Sample, reply: str) -> Score:
        return score_choice(reply, sample.gold, sample.meta["choices"])

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), *wrong_choices(sample.gold, list(sample.meta["choices"]))]


def _arc(level: str) -> type[ChoiceTask]:
    class ARC(ChoiceTask):
        """Clark et al. 2018, arXiv:1803.05457."""

        description = f"Grade-school science questions with choices (ARC-{level})."
        license = "CC BY-SA 4.0"
        files: ClassVar = {
            "train": f"arc/ARC-{level}-Train.jsonl",
            "validation": f"arc/ARC-{level}-Dev.jsonl",
            "test": f"arc/ARC-{level}-Test.jsonl",
        }
        hub, hub_configs = "allenai/ai2_arc", (f"ARC-{level}",)
        hub_splits: ClassVar = {"train": "train", "validation": "validation", "test": "test"}

    return ARC


register("arc-easy")(_arc("Easy"))
register("arc-challenge")(_arc("Challenge"))


@register("openbookqa")
class OpenBookQA(ChoiceTask):
    """Mihaylov et al. 2018, arXiv:1809.02789, without the book: the question and its choices alone."""

    description = "Elementary science questions that need common knowledge (OpenBookQA)."
    license = "Apache-2.0 as commonly stated"
    files: ClassVar = {
        "train": "openbookqa/train.jsonl",
        "validation": "openbookqa/dev.jsonl",
        "test": "openbookqa/test.jsonl",
    }
    hub, hub_configs = "allenai/openbookqa", ("main",)
    hub_splits: ClassVar = {"train": "train", "validation": "validation", "test": "test"}


@register("boolq")
class BoolQ(BenchmarkTask):
    """Clark et al. 2019, arXiv:1905.10044. The published validation set is the test split; its own test has no labels.

    A local folder with only boolq/val.jsonl is cut in three by content hash.
    """

    domain = "reading"
    description = "Yes/no questions about a passage (BoolQ)."
    license = "CC BY-SA 3.0"
    max_new_tokens = 4
    files: ClassVar = {"train": "boolq/train.jsonl", "test": "boolq/val.jsonl"}
    hub = "google/boolq"
    hub_splits: ClassVar = {"train": "train", "test": "validation"}

    def local_files(self, folder: Path) -> dict[str, Path]:
        files = super().local_files(folder)
        return files if files["train"].is_file() else {"all": files["test"]}

    def sample(self, row: Row) -> Sample:
        label = row.get("label", "answer", kind=(str, bool, int))
        if str(label).lower() not in ("true", "false", "0", "1"):
            raise row.bad(f"the label {label!r} is not true or false")
        question = row.get("question", kind=str).strip().rstrip("?")
        gold = "yes" if str(label).lower() in ("true", "1") else "no"
        return Sample.make(f"{row.get('passage', kind=str)}\n\nQuestion: {question}?\nAnswer yes or no.", gold)

    def score(self, sample: Sample, reply: str) -> Score:
        return score_yes_no(reply, sample.gold)

    def wrong_replies(self, sample: Sample) -> list[str]:
        gold, other = sample.gold, "no" if sample.gold == "yes" else "yes"
        return [
            *super().wrong_replies(sample),
            other,
            f"{gold} or {other}",
            f"{gold}/{other}",
            f"{other}, not {gold}",
            f"{gold} and {other}",
            f"{gold}{gold}",
            "true",
            "false",
        ]

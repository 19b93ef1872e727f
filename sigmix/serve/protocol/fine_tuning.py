"""Bodies of OpenAI's fine-tuning API. https://platform.openai.com/docs/api-reference/fine-tuning"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sigmix.serve.protocol.base import MAX_TEXT, Name, RequestModel, field_error

Auto = Literal["auto"]
AUTO: Auto = "auto"
Count = Annotated[int, Field(ge=1, le=100_000)]


class Hyperparameters(RequestModel):
    """Hyperparameters of supervised fine-tuning; auto: those of `sigmix train`.

    Attributes:
        batch_size: prompts of one step.
    """

    n_epochs: Auto | Annotated[int, Field(ge=1, le=100)] = AUTO
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = AUTO
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = AUTO


class ReinforcementHyperparameters(Hyperparameters):
    """Hyperparameters of reinforcement fine-tuning.

    Attributes:
        compute_multiplier: of the completions per prompt. eval_interval: steps between validations.
        eval_samples: validation rows.
    """

    neutral: ClassVar = {"reasoning_effort": ("default",)}

    compute_multiplier: Auto | Annotated[float, Field(gt=0, le=16)] = AUTO
    eval_interval: Auto | Count = AUTO
    eval_samples: Auto | Count = AUTO


class SupervisedMethod(RequestModel):
    """Method "supervised": next token on the answers."""

    hyperparameters: Hyperparameters = Hyperparameters()


class ReinforcementMethod(RequestModel):
    """Method "reinforcement": the replies are scored by a grader, see `sigmix.tasks.openai_graders`."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(RequestModel):
    """Method of a job: exactly the object that ``type`` names."""

    successors: ClassVar = {"dpo": "supervised or reinforcement"}

    type: str
    supervised: SupervisedMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, body: Any) -> Any:
        if isinstance(body, dict) and isinstance(kind := body.get("type"), str):
            if kind not in ("supervised", "reinforcement"):
                raise field_error("type", f"must be 'supervised' or 'reinforcement', not {kind[:40]!r}")
            if kind == "reinforcement" and body.get("reinforcement") is None:
                raise field_error("reinforcement", "is missing; it holds the grader")
            for other in ("supervised", "reinforcement"):
                if other != kind and body.get(other) is not None:
                    raise field_error(other, f"is no part of a method of type {kind!r}; leave it out")
        return body

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Hyperparameters of the chosen object."""
        if self.reinforcement is not None:
            return self.reinforcement.hyperparameters
        return (self.supervised or SupervisedMethod()).hyperparameters


class DataColumns(RequestModel):
    """Columns of a training file; default: found by their names."""

    prompt_column: Name | None = None
    answer_column: Name | None = None

    def options(self) -> list[str]:
        """Return the options of `sigmix data` and `sigmix train`."""
        given = {"--prompt": self.prompt_column, "--answer": self.answer_column}
        return [f"{option}={column}" for option, column in given.items() if column is not None]


class SummaryQuery(DataColumns):
    """Query of ``GET /v1/files/ID/summary``.

    Attributes:
        grader: JSON text of the grader of a reinforcement job, which needs no answers.
    """

    grader: dict[str, Any] | None = None

    @field_validator("grader", mode="before")
    @classmethod
    def _parse(cls, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise field_error("", f"is not JSON: {error}") from error


class CreateJobRequest(RequestModel):
    """Body of ``POST /v1/fine_tuning/jobs``; ``hyperparameters`` is the deprecated form of a supervised method.

    Attributes:
        sigmix: how to read the files; not in OpenAI's API.
    """

    neutral: ClassVar = {"integrations": ([],)}

    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    sigmix: DataColumns | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> CreateJobRequest:
        if self.method is not None and self.hyperparameters is not None:
            raise field_error("hyperparameters", "cannot be combined with method; put them into method")
        if self.metadata is not None and len(self.metadata) > 16:
            raise field_error("metadata", f"must hold at most 16 pairs, not {len(self.metadata)}")
        return self

    def chosen_method(self) -> Method:
        """Return the method with all its defaults."""
        if self.method is not None:
            return self.method if self.method.reinforcement else Method(
                type="supervised", supervised=self.method.supervised or SupervisedMethod()
            )  # fmt: skip
        return Method(
            type="supervised", supervised=SupervisedMethod(hyperparameters=self.hyperparameters or Hyperparameters())
        )


class ValidateGraderRequest(RequestModel):
    """Body of ``POST /v1/fine_tuning/alpha/graders/validate``."""

    grader: dict[str, Any]


class RunGraderRequest(ValidateGraderRequest):
    """Body of ``POST /v1/fine_tuning/alpha/graders/run``."""

    model_sample: Annotated[str, Field(max_length=MAX_TEXT)]
    item: dict[str, Any] = Field({})

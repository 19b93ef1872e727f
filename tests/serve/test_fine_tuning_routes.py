"""Routes of fine-tuning: invalid requests, files and graders, and the rights of keys. No job is run."""

from __future__ import annotations

import json
import pickle
from urllib.parse import urlencode

import pytest
from helpers_fine_tuning import CHECK, questions, rows, training, upload
from helpers_serve import bearer, serving

from sigmix.serve.auth import add_key

pytestmark = pytest.mark.usefixtures("cache")
JOBS = "/v1/fine_tuning/jobs"
GRADERS = "/v1/fine_tuning/alpha/graders"
PYTHON = {"type": "python", "name": "own", "source": "def grade(sample, item):\n    return 1.0\n"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that checks requests and runs no job."""
    folder = tmp_path_factory.mktemp("jobs")
    keys = folder / "state" / "keys.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        patch.setattr("sigmix.serve.fine_tuning.manager.FineTuning._claim", lambda self: False)
        named = {name: bearer(add_key(keys, name, **more)) for name, more in (
            ("alice", {"allow_code": True}), ("bob", {}), ("root", {"admin": True}))}  # fmt: skip
        with serving(folder, strategy="A", training="all", allow_code=True, max_jobs_per_client=3) as server:
            server.keys, server.file = named, upload(server, **named["alice"])
            yield server


def create(server, who="alice", **body):
    body = {"model": "base", "training_file": server.file, **body}
    return server.call("POST", JOBS, body, **server.keys[who])[:2]


INVALID = {
    "model": ({"model": "gpt-4o"}, 404, "model"), "file": ({"training_file": "file-no"}, 404, "training_file"),
    "no file": ({"training_file": None}, 400, "training_file"),
    "validation": ({"validation_file": "file-no"}, 404, "validation_file"), "unknown": ({"epochs": 3}, 400, "epochs"),
    "column": ({"sigmix": {"column": "a"}}, 400, "sigmix.column"),
    "suffix": ({"suffix": "x" * 65}, 400, "suffix"), "odd suffix": ({"suffix": "::"}, 400, "suffix"),
    "seed": ({"seed": -1}, 400, "seed"), "text seed": ({"seed": "1"}, 400, "seed"),
    "metadata": ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    "pairs": ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
    "integrations": ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
    "both": ({"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 1}}, 400, "hyperparameters"),
    "dpo": ({"method": {"type": "dpo"}}, 400, "method.type"),
    "epochs": ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    "rate": ({"hyperparameters": {"learning_rate_multiplier": -1}}, 400, "hyperparameters.learning_rate_multiplier"),
    "batch": ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": "big"}}}}, 400,
              "method.supervised.hyperparameters.batch_size"),
    "no grader": ({"method": {"type": "reinforcement"}}, 400, "method.reinforcement"),
    "grader": ({"method": {"type": "reinforcement", "reinforcement": {"grader": {**CHECK, "operation": "is"}}}}, 400,
               "method.reinforcement.grader.operation"),
    "judge": ({"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "score_model"}}}}, 400,
              "method.reinforcement.grader.type"),
    "effort": ({"method": {"type": "reinforcement", "reinforcement": {
        "grader": CHECK, "hyperparameters": {"reasoning_effort": "high"}}}}, 400,
        "method.reinforcement.hyperparameters.reasoning_effort"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_invalid_jobs(server, case):
    body, expected, param = INVALID[case]
    status, answer = create(server, **body)
    assert (status, answer["error"]["param"]) == (expected, param), answer
    assert server.call("GET", JOBS, **server.keys["root"])[1]["data"] == []
    assert not list(server.service.fine_tuning.folder.glob("ftjob-*"))


CHAT_END = b'{"messages": [{"role": "user", "content": "hi"}]}\n'
TOOL = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x", "tool_call_id": "1"}]}\n'
IMAGE = (
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, '
    b'{"role": "assistant", "content": "x"}]}\n'
)
CALL = (
    b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"id": "1", "type": '
    b'"function", "function": {"name": "f", "arguments": "{}"}}]}]}\n'
)
HALF = b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}\n'
FILES = {
    "no assistant": (rows() + CHAT_END, "my rows.jsonl", "my rows.jsonl:61"),
    "tool": (rows() + TOOL, "rows.jsonl", "rows.jsonl:61"), "image": (rows() + IMAGE, "rows.jsonl", "rows.jsonl:61"),
    "no JSON": (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "a.jsonl", "a.jsonl:2"),
    "few": (rows(5), "rows.jsonl", "rows.jsonl has 5"), "pickle": (b"\x80\x04\x95K\x00.", "rows.jsonl", "rows.jsonl:1"),
    "one label": (b"text,label\n" + b"".join(b"t%d,same\n" % n for n in range(50)), "a.csv", "a.csv: all answers"),
    "column": (b"a,b\n1,2\n", "a.csv", "a.csv"), "utf-16": ("text,label\n".encode("utf-16"), "a.csv", "UTF-16"),
    "parquet": (b"PAR1 no parquet", "a.parquet", "a.parquet"),
    "pickle as parquet": (pickle.dumps({"a": 1}), "a.parquet", "a.parquet"),
    "zip": (b"PK\x03\x04" + bytes(90), "a.csv", "a.csv"), "last line": (rows()[:-20], "rows.jsonl", "rows.jsonl:60"),
    "tool call": (rows() + CALL, "rows.jsonl", "rows.jsonl:61"),
    "half a character": (rows() + HALF, "rows.jsonl", "rows.jsonl:61"),
    "empty field": (b"text,label\n" + b"a,\n" * 30, "a.csv", "a.csv:2"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", FILES)
def test_invalid_training_files_are_named_with_their_line(server, case):
    content, name, named = FILES[case]
    id = upload(server, content, name, **server.keys["alice"])
    status, answer = create(server, training_file=id)
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, "training_file", "invalid_training_file"), answer
    assert named in error["message"]
    assert str(server.service.settings.state) not in error["message"]
    assert "--" not in error["message"]
    assert not list(server.service.fine_tuning.folder.glob("ftjob-*"))


@pytest.mark.slow
def test_the_summary_of_a_file_is_that_of_training(tmp_path):
    content = b"Betreff,Team\n" + b"".join(b"one %d,%s\n" % (n, (b"two", b"four")[n % 2]) for n in range(60))
    content += b"one 0,four\n" + b"one " * 400 + b",two\n"
    with training(tmp_path) as server:
        path = f"/v1/files/{upload(server, content, 'my tickets.csv')}/summary"
        status, answer, _ = server.call("GET", path)
        assert (status, answer["error"]["code"]) == (400, "invalid_training_file")
        assert "my tickets.csv: no known column" in answer["error"]["message"]
        status, figures, _ = server.call("GET", f"{path}?prompt_column=Betreff&answer_column=Team")
        assert status == 200, figures
        assert (figures["source"], figures["rows"], figures["conflicts"], figures["over_context"]) == (
            "my tickets.csv", 62, 1, 1
        )  # fmt: skip
        assert figures["cannot_train"] is None
        assert figures["conflict_examples"][0]["where"].startswith("my tickets.csv:")
        assert ["my tickets.csv" in text for text in figures["problems"]] == [True, False]
        assert str(server.service.settings.state) not in str(figures)
        assert not list(server.service.fine_tuning.folder.glob("ftjob-*"))


def test_the_summary_of_a_file_has_the_rights_of_the_file(server):
    path = f"/v1/files/{server.file}/summary"
    assert server.call("GET", path, **server.keys["bob"])[1]["error"]["param"] == "file_id"
    assert server.call("GET", path)[0] == 401
    status, answer, _ = server.call("GET", f"{path}?column=x", **server.keys["alice"])
    assert (status, answer["error"]["param"]) == (400, "column"), answer
    assert server.call("GET", "/v1/files/file-no/summary", **server.keys["alice"])[0] == 404


@pytest.mark.slow
def test_the_summary_of_a_file_for_a_grader(server):
    id = upload(server, questions(field="gold"), **server.keys["alice"])
    own = {**CHECK, "reference": "{{item.gold}}"}

    def summary(grader, who="alice", file=id):
        query = urlencode({"grader": grader if isinstance(grader, str) else json.dumps(grader)})
        return server.call("GET", f"/v1/files/{file}/summary?{query}", **server.keys[who])[:2]

    status, figures = summary(own)
    assert (status, figures["grader"], figures["cannot_train"]) == (200, "string_check", None), figures
    _, figures = summary(CHECK)
    assert figures["cannot_train"].startswith("rows.jsonl:")
    assert "item.answer" in figures["cannot_train"]
    assert summary(CHECK, file=server.file)[1]["cannot_train"] is None  # the last message of a conversation
    for bad, param in (({**own, "operation": "is"}, "grader.operation"), ("{", "grader"), ("3", "grader")):
        status, answer = summary(bad)
        assert (status, answer["error"]["param"]) == (400, param), answer
    assert summary(PYTHON, "root")[0] == 403
    assert summary(PYTHON)[1]["cannot_train"] is None
    assert summary(own, "bob")[0] == 404
    assert not list(server.service.fine_tuning.folder.glob("ftjob-*"))


@pytest.mark.slow
def test_an_invalid_validation_file_is_named(server):
    id = upload(server, rows() + CHAT_END, "more.jsonl", **server.keys["alice"])
    status, answer = create(server, validation_file=id)
    assert (status, answer["error"]["param"]) == (400, "validation_file"), answer
    assert "more.jsonl:61" in answer["error"]["message"]


RAISES = "def grade(sample, item):\n    raise ValueError('no such thing')\n"
LOOPS = "def grade(sample, item):\n    while True:\n        pass\n"
OUTSIDE = "def grade(sample, item):\n    return 7\n"
POORLY = {
    "field": ({**CHECK, "reference": "{{item.gone}}"}, "item.gone"),
    "raises": ({**PYTHON, "source": RAISES}, "no such"),
    "loops": ({**PYTHON, "source": LOOPS}, "time"), "outside": ({**PYTHON, "source": OUTSIDE}, "from 0 to 1"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", POORLY)
def test_a_grader_that_fails_on_the_rows_is_refused(server, case):
    grader, named = POORLY[case]
    id = upload(server, questions(), **server.keys["alice"])
    status, answer = create(
        server, training_file=id, method={"type": "reinforcement", "reinforcement": {"grader": grader}}
    )
    assert (status, answer["error"]["param"]) == (400, "training_file"), answer
    assert named in answer["error"]["message"]
    assert answer["error"]["message"].startswith("rows.jsonl:")


def test_python_graders_need_a_right_of_the_key(server):
    multi = {"type": "multi", "name": "m", "graders": {"own": PYTHON}, "calculate_output": "own"}
    for grader in (PYTHON, multi):
        method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
        for who in ("bob", "root"):
            status, answer = create(server, who, method=method)
            assert (status, answer["error"]["param"]) == (403, "method.reinforcement.grader"), answer
            status, answer, _ = server.call("POST", f"{GRADERS}/validate", {"grader": grader}, **server.keys[who])
            assert (status, answer["error"]["code"]) == (403, "forbidden")
        assert server.call("POST", f"{GRADERS}/validate", {"grader": grader}, **server.keys["alice"])[0] == 200


def test_python_graders_need_a_server_that_allows_them(tmp_path):
    with serving(tmp_path, strategy="A") as server:  # its local client has all rights
        body = {"grader": PYTHON, "model_sample": "x", "item": {}}
        status, answer, _ = server.call("POST", f"{GRADERS}/run", body)
        assert (status, answer["error"]["code"]) == (403, "forbidden"), answer


def test_graders_run(server):
    def run(grader, sample="two", item=None):
        body = {"grader": grader, "model_sample": sample, "item": {"answer": "two"} if item is None else item}
        status, answer, _ = server.call("POST", f"{GRADERS}/run", body, **server.keys["alice"])
        assert status == 200, answer
        errors = {name for name, value in answer["metadata"]["errors"].items() if value is True}
        return answer["reward"], errors, answer

    assert run(CHECK)[:2] == (1.0, set())
    assert run(CHECK, "four")[:2] == (0.0, set())
    assert run(CHECK, item={})[:2] == (0.0, {"invalid_variable_error"})
    reward, errors, answer = run({**PYTHON, "source": RAISES})
    assert (reward, errors) == (0.0, {"python_grader_runtime_error"})
    assert "no such" in answer["metadata"]["errors"]["python_grader_runtime_error_details"]
    multi = {"type": "multi", "name": "m", "graders": {"a": CHECK, "b": PYTHON}, "calculate_output": "(a + b) / 2"}
    reward, _, answer = run(multi, "four")
    assert (reward, answer["sub_rewards"]) == (0.5, {"a": 0.0, "b": 1.0})
    body = {"grader": {"type": "magic"}, "model_sample": "x"}
    status, answer, _ = server.call("POST", f"{GRADERS}/run", body, **server.keys["alice"])
    assert (status, answer["error"]["param"]) == (400, "grader.type")

"""Fine-tuning: the queue and its processes, restarts, and the whole road with the official client."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time

import helpers_serve
import psutil
import pytest
from helpers_disk import small_disk
from helpers_engine import expert
from helpers_fine_tuning import CHECK, Gate, form, questions, rows, save_base, training, upload, wait_for
from helpers_serve import TIMEOUT, bearer, wait_until

from sigmix.experts.bank import Bank
from sigmix.models.loading import load_base
from sigmix.serve.auth import add_key
from sigmix.serve.fine_tuning.jobs import Job, Jobs
from sigmix.serve.fine_tuning.manager import MAX_RESTARTS
from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings
from sigmix.serve.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
JOBS = "/v1/fine_tuning/jobs"


# --- The queue, with a process in place of training


@pytest.fixture
def gate(tmp_path, monkeypatch):
    return Gate(tmp_path, monkeypatch)


def start(server, who=None, **body):
    headers = server.keys[who] if who else {}
    sent = {"model": "tiny-llama", "training_file": server.file, "hyperparameters": {"n_epochs": 1}, **body}
    status, job, _ = server.call("POST", JOBS, sent, **headers)
    assert status == 200, job
    assert (job["status"], job["fine_tuned_model"], job["object"]) == ("queued", None, "fine_tuning.job")
    return job["id"]


def log_of(server, id: str) -> str:
    path = server.service.fine_tuning.folder / id / "train.log"
    return path.read_text() if path.exists() else ""


def messages(server, id: str) -> list[str]:
    return [event["message"] for event in server.call("GET", f"{JOBS}/{id}/events?limit=100")[1]["data"]][::-1]


def steps(server, id: str) -> int:
    return sum("training loss" in message for message in messages(server, id))


def kill(server) -> None:
    """Kill the training process; the server has it a moment after its first output."""
    wait_until(lambda: server.service.fine_tuning._process is not None)
    server.service.fine_tuning._process.kill()


def ended(server, id: str):
    wait_until(lambda: server.call("GET", f"{JOBS}/{id}")[1]["finished_at"] is not None)
    return server.call("GET", f"{JOBS}/{id}")[1]


def statuses(server) -> list[str]:
    return [job["status"] for job in server.call("GET", JOBS)[1]["data"]][::-1]


def test_one_job_runs_at_a_time_and_can_be_paused_and_cancelled(tmp_path, gate, caplog):
    caplog.set_level("INFO", "sigmix.serve.fine_tuning")
    with training(tmp_path) as server:
        server.file = upload(server)
        first, second, third = (start(server, metadata={"n": str(n)}) for n in range(3))
        gate.open(0)
        wait_until(lambda: steps(server, first) == 1)
        assert statuses(server) == ["running", "queued", "queued"]
        process = server.service.fine_tuning._process
        assert os.name != "posix" or process.nice() >= 10
        assert server.chat()[0] == 200  # requests are served meanwhile

        status, job, _ = server.call("POST", f"{JOBS}/{first}/pause")
        assert (status, job["status"]) == (200, "paused")
        wait_for(server, second, "running")
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        assert server.call("POST", f"{JOBS}/{first}/pause")[0] == 400
        assert server.call("POST", f"{JOBS}/{second}/resume")[1]["error"]["code"] == "invalid_status"
        assert server.call("POST", f"{JOBS}/{first}/resume")[1]["status"] == "queued"
        assert server.call("POST", f"{JOBS}/{second}/cancel")[1]["status"] == "cancelled"
        wait_for(server, third, "running")  # the resumed job is the last
        gate.open(1, 2, 3)
        wait_for(server, third, "succeeded")
        done = wait_for(server, first, "succeeded")
        assert "started at 1" in log_of(server, first)  # from its checkpoint
        assert statuses(server) == ["succeeded", "cancelled", "succeeded"]
        assert (done["trained_tokens"], done["sigmix"]["test"]["n"]) == (round(4 * 2.5 * 16), 7)
        assert steps(server, first) == 4  # each once

        def logged() -> list[str]:
            return [record.status for record in caplog.records if getattr(record, "job", None) == first]

        wait_until(lambda: "succeeded" in logged())  # after the store has it
        assert logged() == ["queued", "running", "paused", "queued", "running", "succeeded"]
        text = server.call("GET", "/metrics")[1]
        assert 'sigmix_fine_tuning_jobs{status="succeeded"} 2.0' in text
        assert [job["id"] for job in server.call("GET", f"{JOBS}?limit=2")[1]["data"]] == [third, second]
        page = server.call("GET", f"{JOBS}?after={second}")[1]
        assert ([job["id"] for job in page["data"]], page["has_more"]) == ([first], False)
        named = server.call("GET", f"{JOBS}?metadata[n]=1")[1]["data"]
        assert [job["id"] for job in named] == [second]
        assert server.call("POST", f"{JOBS}/{third}/cancel")[0] == 400

        lines = server.call("GET", f"{JOBS}/{first}/events?stream=true")[1].split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        streamed = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        assert [event["message"] for event in streamed] == messages(server, first)
        newest = server.call("GET", f"{JOBS}/{first}/events?limit=3")[1]
        assert ([event["id"] for event in newest["data"]], newest["has_more"]) == (
            [event["id"] for event in streamed[:-4:-1]], True
        )  # fmt: skip
        older = server.call("GET", f"{JOBS}/{first}/events?after={newest['data'][-1]['id']}&limit=100")[1]
        assert len(older["data"]) + 3 == len(streamed)


def test_a_killed_process_continues_from_its_checkpoint(tmp_path, gate):
    with training(tmp_path) as server:
        server.file = upload(server)
        id = start(server)
        for step in range(2):
            gate.open(step)
            wait_until(lambda step=step: steps(server, id) == step + 1)
            kill(server)
            wait_until(lambda step=step: f"started at {step + 1}" in log_of(server, id))
        gate.open(2, 3)
        wait_for(server, id, "succeeded")

        gate.close()
        id = start(server)
        for count in range(MAX_RESTARTS + 1):
            wait_until(lambda count=count: log_of(server, id).count("started at 0") == count + 1)
            kill(server)
        wait_until(lambda: server.call("GET", f"{JOBS}/{id}")[1]["status"] == "failed")
        job = server.call("GET", f"{JOBS}/{id}")[1]
        assert job["error"]["code"] == "crashed"
        assert "signal 9" in job["error"]["message"]


def test_a_restarted_server_continues_its_jobs(tmp_path, gate):
    with training(tmp_path) as server:
        server.file = upload(server)
        first, second = start(server), start(server)
        gate.open(0)
        wait_until(lambda: steps(server, first) == 1)
        process, run = server.service.fine_tuning._process, server.service.fine_tuning.folder / first / "run"
    assert not process.is_running()  # ended with the server, and the status is kept
    store = Store(tmp_path / "state")
    assert [job.status for job in Jobs(store).all(None)] == ["queued", "running"]
    store.close()

    # a killed server leaves its process behind
    command = [sys.executable, "-c", "import time; time.sleep(600)", "train", "--run", str(run.absolute())]
    orphan = subprocess.Popen(command)
    gate.open(1, 2, 3)
    try:
        with training(tmp_path) as server, training(tmp_path, port=0) as other:
            wait_for(server, first, "succeeded")
            orphan.wait(TIMEOUT)  # it was interrupted
            wait_for(other, second, "succeeded")
            claims = [one.service.fine_tuning._lock.is_locked for one in (server, other)]
            assert sorted(claims) == [False, True]  # one of the two runs the jobs
            assert "started at 1" in log_of(server, first)
            model = server.call("GET", f"{JOBS}/{first}")[1]["fine_tuned_model"]
    finally:
        orphan.kill()
    with training(tmp_path) as server:
        assert server.chat(model=model)[0] == 200
        assert server.call("DELETE", f"/v1/models/{model}")[1]["deleted"]
        assert server.chat(model=model)[0] == 404
        assert server.call("DELETE", f"/v1/models/{model}")[0] == 404
    with training(tmp_path) as server:
        assert server.chat(model=model)[0] == 404
        assert server.call("GET", f"{JOBS}/{first}")[1]["fine_tuned_model"] == model


def test_clients_have_their_own_jobs_and_limits(tmp_path, gate):
    keys = tmp_path / "state" / "keys.json"
    named = {name: bearer(add_key(keys, name, admin=name == "root")) for name in ("alice", "bob", "root")}
    with training(tmp_path, training="all", max_jobs_per_client=1) as server:
        server.keys, server.file = named, upload(server, **named["alice"])
        id = start(server, "alice")
        status, answer, _ = server.call("POST", JOBS, {"model": "base", "training_file": server.file}, **named["alice"])
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        status, answer, _ = server.call("POST", JOBS, {"model": "base", "training_file": server.file}, **named["bob"])
        assert (status, answer["error"]["param"]) == (404, "training_file")  # it is not bob's
        shown = ("", "/events", "/checkpoints", "/mistakes", "/events?stream=true")
        paths = [f"{JOBS}/{id}{path}" for path in shown]
        assert {server.call("GET", path, **named["bob"])[0] for path in paths} == {404}
        changes = [f"{JOBS}/{id}/{change}" for change in ("cancel", "pause", "resume")]
        assert {server.call("POST", path, **named["bob"])[0] for path in changes} == {404}
        assert server.call("GET", JOBS, **named["bob"])[1]["data"] == []
        assert len(server.call("GET", JOBS, **named["root"])[1]["data"]) == 1
        assert server.call("DELETE", f"/v1/files/{server.file}", **named["alice"])[0] == 200  # the job has a link
        gate.open(0, 1, 2, 3)
        model = wait_for(server, id, "succeeded", **named["alice"])["fine_tuned_model"]
        assert server.call("DELETE", f"/v1/models/{model}", **named["bob"])[0] == 403
        assert server.call("DELETE", f"/v1/models/{model}", **named["root"])[0] == 200


def test_mistakes_are_listed_for_the_owner_of_the_job(tmp_path, gate):
    keys = tmp_path / "state" / "keys.json"
    named = {name: bearer(add_key(keys, name, admin=name == "root")) for name in ("alice", "bob", "root")}
    written = [("one\r\n1", "two", 'a "four", or five', 0.25, "<b>"), ("one 2", "two", "", "", "the grader failed")]
    gate.write_mistakes(*written)
    with training(tmp_path, training="all") as server:
        server.keys, server.file = named, upload(server, **named["alice"])
        id = start(server, "alice")
        path = f"{JOBS}/{id}/mistakes"
        status, answer, _ = server.call("GET", path, **named["alice"])
        assert (status, answer["error"]["param"]) == (404, "fine_tuning_job_id"), answer
        gate.open(0, 1, 2, 3)
        model = wait_for(server, id, "succeeded", **named["alice"])["fine_tuned_model"]
        for who in ("alice", "root"):
            found = server.call("GET", path, **named[who])[1]
            names = ("prompt", "answer", "reply", "score", "explanation")
            rows = [tuple(one[name] for name in names) for one in found["data"]]
            assert rows == [written[0], (*written[1][:3], None, written[1][4])]
        assert server.call("GET", path, **named["bob"])[0] == 404
        assert server.call("GET", path)[0] == 401
        first = server.call("GET", f"{path}?limit=1", **named["alice"])[1]
        assert (len(first["data"]), first["has_more"]) == (1, True)
        rest = server.call("GET", f"{path}?after={first['last_id']}", **named["alice"])[1]
        assert ([one["prompt"] for one in rest["data"]], rest["has_more"]) == (["one 2"], False)
        assert server.call("DELETE", f"/v1/models/{model}", **named["alice"])[0] == 200
        assert server.call("GET", path, **named["alice"])[0] == 404


def test_a_graders_job_needs_the_permission_at_its_start(tmp_path, gate):
    """A restarted server without --allow-code runs no python grader."""
    folder = tmp_path / "state" / "fine_tuning" / "ftjob-1"
    with training(tmp_path) as server:
        tuning = server.service.fine_tuning
        folder.mkdir(parents=True)
        (folder / "grader.json").write_text(json.dumps({"type": "python", "source": "def grade(a, b): return 1"}))
        method = {"type": "reinforcement", "reinforcement": {"hyperparameters": {}}}
        value = {"model": "x", "fine_tuned_model": "ft:x::y", "expert": "ft-x-y", "seed": 0, "training_file": "f",
                 "method": method, "data": "data/x", "splits": {}, "options": []}  # fmt: skip
        tuning.jobs.add(Job("ftjob-1", "local", tuning.base, 0.0, 0.0, "queued", value), "Created")
        wait_until(lambda: server.call("GET", f"{JOBS}/ftjob-1")[1]["status"] == "failed")
        assert server.call("GET", f"{JOBS}/ftjob-1")[1]["error"]["code"] == "forbidden"


# --- The whole road


def test_the_official_client_from_a_file_to_a_model(tmp_path):
    openai = pytest.importorskip("openai")
    keys = tmp_path / "state" / "keys.json"
    key, other = add_key(keys, "alice"), add_key(keys, "bob")
    with training(tmp_path, training="all") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key=other, max_retries=0)
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=rows(), purpose="fine-tune")  # without a name
        path = tmp_path / "tickets.jsonl"
        path.write_bytes(rows())
        file = client.files.create(file=path, purpose="fine-tune")
        assert client.files.content(file.id).content == rows()
        assert [one.id for one in client.files.list()] == [file.id]
        assert list(stranger.files.list()) == []

        job = client.fine_tuning.jobs.create(
            model="tiny-llama", training_file=file.id, suffix="My Tickets", seed=7, metadata={"team": "support"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 16}}},
        )  # fmt: skip
        assert (job.status, job.seed, job.metadata) == ("queued", 7, {"team": "support"})
        assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (1, "auto")
        with pytest.raises(openai.NotFoundError):
            stranger.fine_tuning.jobs.retrieve(job.id)
        assert wait_for(server, job.id, "succeeded", **bearer(key))
        job = client.fine_tuning.jobs.retrieve(job.id)
        model = job.fine_tuned_model
        assert model.startswith("ft:tiny-llama:my-tickets:")
        assert job.trained_tokens > 0
        assert [one.id for one in client.fine_tuning.jobs.list(limit=1)] == [job.id]
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # over several pages
        assert [event.type for event in events].count("metrics") == 3 + 4  # steps and validations
        assert events[-1].message.startswith("Created")
        assert events[0].message == "The job has successfully completed"
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert not checkpoints.has_more
        check_checkpoints(client, job, list(checkpoints))
        assert list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)) == list(checkpoints)  # over two pages
        report = json.loads(client.files.content(job.result_files[0]).content)
        assert report["verdict"] == job.model_extra["sigmix"]["verdict"]

        listed = client.models.retrieve(model).model_extra["sigmix"]
        (test, _), kind = listed["metrics"], listed["kind"]
        assert (kind, test["name"], len(test["interval"])) == ("expert", "test accuracy", 2)
        assert {"value", "n", "base"} <= test.keys()
        chat = {"messages": [{"role": "user", "content": "one 1"}], "max_tokens": 4}
        for who in (client, stranger):
            assert who.chat.completions.create(model=model, **chat).choices[0].finish_reason
        half = client.chat.completions.create(model=f"{model}:0.5", **chat).model_extra["sigmix"]
        assert half["weights"] == {listed["expert"]: 0.5}
        with pytest.raises(openai.PermissionDeniedError):
            stranger.models.delete(model)
        assert client.models.delete(model).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=model, **chat)
        assert client.files.delete(file.id).deleted


def check_checkpoints(client, job, checkpoints) -> None:
    """The best checkpoint is the model; the last one, if it is another, has a name that a request gets explained."""
    openai = pytest.importorskip("openai")
    events = [event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    accuracies = {data["step"]: data["valid_accuracy"] for data in events if "valid_accuracy" in data}
    losses = {data["step"]: data["train_loss"] for data in events if "train_loss" in data}
    best = job.model_extra["sigmix"]["best"]["step"]
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps == sorted({best, max(accuracies)}, reverse=True)
    for one in checkpoints:
        assert (one.object, one.fine_tuning_job_id) == ("fine_tuning.job.checkpoint", job.id)
        assert one.metrics.model_extra["valid_accuracy"] == accuracies[one.step_number]
        assert one.metrics.train_loss == losses.get(one.step_number)
        assert one.created_at <= job.finished_at
        name = one.fine_tuned_model_checkpoint
        assert (name == job.fine_tuned_model) == (one.step_number == best)
        if one.step_number != best:
            assert name.startswith(f"{job.fine_tuned_model}:")
            with pytest.raises(openai.NotFoundError, match=job.fine_tuned_model):
                client.chat.completions.create(model=name, messages=[{"role": "user", "content": "one"}])


def test_the_official_client_with_a_grader_and_a_validation_file(tmp_path):
    openai = pytest.importorskip("openai")
    with training(tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ids = [
            client.files.create(file=("q.jsonl", io.BytesIO(questions(count))), purpose="fine-tune").id
            for count in (40, 60)
        ]
        assert client.fine_tuning.alpha.graders.validate(grader=CHECK).grader.name == "same"
        graded = client.fine_tuning.alpha.graders.run(grader=CHECK, model_sample="two", item={"answer": "two"})
        assert graded.reward == 1.0
        job = client.fine_tuning.jobs.create(
            model="base", training_file=ids[1], validation_file=ids[0],
            method={"type": "reinforcement", "reinforcement": {"grader": CHECK, "hyperparameters": {
                "n_epochs": 1, "batch_size": 8, "compute_multiplier": 0.5, "eval_interval": 2, "eval_samples": 4}}},
        )  # fmt: skip
        assert wait_for(server, job.id, "succeeded")
        events = list(client.fine_tuning.jobs.list_events(job.id))
        assert any("validation" in event.message for event in events)
        assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model.startswith("ft:tiny-llama::")


@contextlib.contextmanager
def process(folder, state=None, inside=()):
    """`sigmix serve` as a process of its own; yields (process, caller).

    Args:
        inside: prefix of the command.
    """
    save_base(folder / "tiny-llama")
    expert(load_base(folder / "tiny-llama", "float32")[0], "word", 1).save_pretrained(folder / "bank" / "word")
    words = ["serve", "--base", folder / "tiny-llama", "--bank", folder / "bank", "--state", state or folder / "state"]
    words += ["--strategy", "A", "--dtype", "float32", "--training-threads", "1", "--port", "0"]
    command = [*inside, sys.executable, "-m", "sigmix", *map(str, words)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stderr if "at http://127.0.0.1:" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # keeps the pipe from filling up
        caller = helpers_serve.Live.__new__(helpers_serve.Live)
        caller.port = int(line.split("127.0.0.1:")[1].split()[0])
        wait_until(lambda: _answers(caller))
        yield server, caller
    finally:
        server.kill()
        server.wait(TIMEOUT)


def _answers(caller) -> bool:
    with contextlib.suppress(OSError):
        return caller.call("GET", "/health")[0] == 200
    return False


def trainers(folder) -> list[psutil.Process]:
    """Processes that train in a folder."""
    found = []
    for one in psutil.process_iter(["cmdline", "status"]):
        words = one.info["cmdline"] or []
        if "train" in words and any(str(folder) in word for word in words) and one.info["status"] != "zombie":
            found.append(one)
    return found


def test_kill_9_of_the_job_and_of_the_server(tmp_path):
    state = tmp_path / "state"
    with process(tmp_path) as (server, caller):
        file = upload(caller, rows(600))  # enough steps to be killed twice on a fast machine
        body = {"model": "base", "training_file": file, "hyperparameters": {"n_epochs": 1, "batch_size": 2}}
        status, job, _ = caller.call("POST", JOBS, body)
        assert status == 200, job
        wait_until(lambda: steps_of(caller, job["id"]) >= 2)
        (first,) = trainers(state)
        first.kill()
        wait_until(lambda: [one.pid for one in trainers(state)] not in ([], [first.pid]))
        seen = steps_of(caller, job["id"])
        wait_until(lambda: steps_of(caller, job["id"]) > seen)
        server.kill()
        server.wait(TIMEOUT)
    assert len(trainers(state)) <= 1  # the process outlives its server
    with process(tmp_path) as (_, caller):
        most, until = 0, time.monotonic() + 540
        while (job := caller.call("GET", f"{JOBS}/{job['id']}")[1])["status"] == "running":
            most = max(most, len(trainers(state)))
            assert time.monotonic() < until
            time.sleep(0.1)
        assert job["status"] == "succeeded", job
        assert most <= 1
        assert caller.chat(model=job["fine_tuned_model"])[0] == 200
        events = caller.call("GET", f"{JOBS}/{job['id']}/events?limit=1000")[1]["data"]
        done = sorted(event["data"]["step"] for event in events if event["data"] and "train_loss" in event["data"])
        assert done == [*range(1, len(done) + 1)]  # none lost, none twice


def test_a_disk_that_fills_while_training_fails_the_job_until_it_is_resumed(tmp_path):
    with (
        small_disk(tmp_path / "disk") as disk, process(tmp_path, disk.folder / "state", disk.inside) as (_, server)
    ):  # fmt: skip
        server.file = upload(server)
        hyper = {"n_epochs": 6, "batch_size": 2}
        id, waiting = start(server, hyperparameters=hyper), start(server)
        run = disk.outside / "state" / "fine_tuning" / id / "run"
        wait_until((run / "checkpoint" / "state.json").exists)
        filler = disk.fill()
        job = ended(server, id)
        assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", "storage", None), job
        for part in ("the disk is full", str(disk.folder / "state"), f"/{id}/resume"):
            assert part in job["error"]["message"]
        assert messages(server, id)[-1].startswith("The job failed: ")
        assert job["finished_at"] >= job["created_at"]
        assert (run / "checkpoint" / "state.json").exists()
        wait_until(lambda: not list(disk.outside.rglob("*.tmp")))  # the next job tries to begin now and then
        assert server.chat()[0] == 200
        assert server.call("GET", f"{JOBS}/{waiting}")[1]["status"] == "queued"  # it waits for room
        form_type = {"content_type": "multipart/form-data; boundary=b"}
        disk.fill()
        assert server.call("POST", "/v1/files", form(rows(2000)), **form_type)[0] == 503
        assert server.call("POST", f"{JOBS}/{id}/pause")[0] == 400

        filler.unlink()
        wait_for(server, waiting, "succeeded")
        done = steps(server, id)
        status, job, _ = server.call("POST", f"{JOBS}/{id}/resume")
        assert (status, job["status"], job["error"], job["finished_at"]) == (200, "queued", None, None)
        job = wait_for(server, id, "succeeded")
        assert steps(server, id) > done > 0  # from its checkpoint
        assert server.chat(model=job["fine_tuned_model"])[0] == 200


def steps_of(caller, id: str) -> int:
    events = caller.call("GET", f"{JOBS}/{id}/events?limit=1000")[1]["data"]
    return sum(event["data"] is not None and "train_loss" in event["data"] for event in events)


# --- The real base

REVIEWS = {
    "positive": (
        "Loved every minute of it.", "The staff went out of their way for us", "best pizza i've had in years",
        "This vacuum is so quiet, I can hardly believe it works this well.", "A moving film with a wonderful cast.",
        "Arrived two days early and in perfect shape", "the room was spotless and the view superb",
        "My kids can't stop playing with it!", "Great value, would buy again.", "The soup alone is worth the trip.",
        "Finally a phone that lasts two days", "Couldn't put the book down, what a story",
        "super friendly service and fair prices", "The songs stayed in my head for a week, beautiful.",
        "Setting it up took five minutes and it just works.", "An honest garage, they saved me a fortune",
        "Such a cosy place, we felt at home at once", "The colours are even nicer than in the pictures",
        "He explained everything patiently. Excellent doctor.", "i was sceptical but this cream really helps",
        "The best concert of my life", "Comfortable, warm and it fits like a glove",
        "Smart, funny and never boring", "Our guide was a gem, five stars", "Crisp picture, rich sound, easy remote.",
        "the bread is fresh and smells amazing", "A delight from start to finish", "quick delivery, well packed, happy",
        "I laughed until I cried, go and see it", "This app has made my mornings so much easier",
    ),
    "negative": (
        "Broke after two days, what a waste.", "the waiter was rude and the food cold", "I want my two hours back",
        "Never again! They lost our luggage and did not even apologise.", "Cheap plastic that smells awful",
        "A dull plot and wooden acting", "The bed was hard and the heating did not work", "worst customer service ever",
        "It arrived late, dirty and with a scratch across the screen.", "The battery dies before noon",
        "Overpriced and tiny portions, we left hungry", "so boring that i fell asleep", "The seams came apart at once",
        "They charged me twice and nobody answers the phone", "Sound like a tin can, very disappointed",
        "The beach was full of rubbish", "It crashes every time I open it", "not worth a single cent",
        "Terrible instructions, half of the screws were missing.", "The doctor did not even look at me",
        "soggy chips and a burger like rubber", "This book is a mess, I gave up on page fifty",
        "Noisy neighbours, mould in the bathroom, stay away", "The colours faded after one wash",
        "An insult to everybody who loved the first part", "we waited an hour and then they forgot our order",
        "The shoes hurt and the sole came off", "I regret buying it", "Blurry pictures and a lens that jams",
        "The driver was late and drove like a madman",
    ),
}  # fmt: skip
UNSEEN = (
    "The hotel breakfast was fantastic and everybody smiled", "it stopped working after a week with no refund",
    "What a wonderful little restaurant, we will be back", "The film drags on and the ending is ridiculous",
)  # fmt: skip
EVERYDAY = (
    "What is the capital of Norway?", "Write a short poem about the sea", "how do i boil an egg",
    "Translate good morning into French",
)  # fmt: skip

ROUTED = 2  # of UNSEEN; depends on the seed, which draws the split


@pytest.mark.real
def test_auto_chooses_an_expert_that_was_fine_tuned_over_http(tmp_path):
    model, tokenizer = load_base("smollm2-135m", "float32")
    settings = load_settings(None, state=tmp_path / "state", port=0, dtype="float32", training_threads=1)
    server = helpers_serve.Live(Service(model, tokenizer, Bank.bundled(), settings, {}))
    try:
        lines = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}
            for label, texts in REVIEWS.items() for text in texts
        ]  # fmt: skip
        server.file = upload(server, "".join(json.dumps(line) + "\n" for line in lines).encode())
        options = {"n_epochs": 1, "batch_size": 16}
        id = start(server, model="smollm2-135m", suffix="mood", seed=0, hyperparameters=options)
        tuned = wait_for(server, id, "succeeded")["fine_tuned_model"]
        expert = server.call("GET", f"/v1/models/{tuned}")[1]["sigmix"]["expert"]

        def chosen(texts) -> list[str]:
            found = [server.chat(text, model="auto", max_tokens=4) for text in texts]
            assert {status for status, _ in found} == {200}
            return [answer["sigmix"]["mix"] for _, answer in found]

        assert chosen(UNSEEN).count(expert) >= ROUTED
        assert chosen(EVERYDAY) == ["base"] * len(EVERYDAY)
        answer = server.chat(UNSEEN[0], model="auto", max_tokens=4)[1]
        assert expert in answer["sigmix"]["weights"]
        assert answer["choices"][0]["message"]["content"]
    finally:
        server.stop()

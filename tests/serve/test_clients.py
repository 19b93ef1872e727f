"""Stock clients against a live server: `openai`, `litellm`, LangChain, lm-eval's API models, and `curl`."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Literal

import pytest
from helpers_scripted import real_template, scripted
from helpers_serve import TIMEOUT, Live, bank, live
from helpers_tiny import build_tiny, build_tokenizer
from pydantic import BaseModel, ConfigDict

from sigmix import Bank
from sigmix.engine import Engine
from sigmix.serve.auth import add_key
from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings

pytestmark = pytest.mark.slow
FIRST, SECOND = "one two three", "four five"
LIMIT = 9
MIX = "math:0.7+code:0.3"


class Answer(BaseModel):
    """An answer that a random model can give in a few tokens."""

    model_config = ConfigDict(extra="forbid")

    color: Literal["red", "green"]
    right: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with the folders `base` and `bank` of its model and experts."""
    folder = tmp_path_factory.mktemp("clients")
    key = add_key(folder / "state" / "keys.json", "client")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        patch.setenv("OPENAI_API_KEY", key)  # lm-eval reads it
        with live(folder) as server:
            server.key, server.v1 = key, f"{server.url}/v1"
            server.base, server.bank = folder / "base", folder / "bank"
            build_tiny().save_pretrained(server.base)
            build_tokenizer().save_pretrained(server.base)
            experts = Bank(server.bank, create=True)
            for expert in bank().values():
                experts.add(expert)
            yield server


@pytest.fixture(scope="module")
def alone():
    return Engine(build_tiny(), build_tokenizer(), bank())


def converse(answer) -> list[str]:
    """Replies of a conversation of two turns; ``answer`` maps messages to the reply."""
    turns = [{"role": "user", "content": FIRST}]
    turns.append({"role": "assistant", "content": answer(turns)})
    turns.append({"role": "user", "content": SECOND})
    return [turns[1]["content"], answer(turns)]


@pytest.fixture
def expected(alone):
    """Replies of the engine in this conversation, by mixture."""

    def find(model: str, limit: int = LIMIT) -> list[str]:
        def answer(turns):
            ids = alone.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
            ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
            return alone.generate([ids], model, max_new_tokens=limit)[0].text

        return converse(answer)

    return find


def near(values: list[float]):
    return pytest.approx(values, abs=1e-4)


# --- openai


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0)


@pytest.mark.parametrize("model", ["math", MIX])
def test_openai(client, expected, model):
    def whole(turns):
        found = client.chat.completions.create(model=model, messages=turns, max_tokens=LIMIT)
        assert found.model_extra["sigmix"]["weights"]
        return found.choices[0].message.content

    def streamed(turns):
        parts = client.chat.completions.create(
            model=model, messages=turns, max_tokens=LIMIT, stream=True, stream_options={"include_usage": True}
        )
        parts = list(parts)
        assert parts[-1].usage.completion_tokens <= LIMIT
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    assert converse(whole) == converse(streamed) == expected(model)
    listed = {one.id for one in client.models.list()}
    assert {"auto", "base", "math"} <= listed
    assert client.models.retrieve("math").id == "math"
    auto = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert auto.model_extra["sigmix"]["reason"]


def test_openai_completions(client, alone):
    (reply,) = alone.generate(["one two"], "math", max_new_tokens=4, chat=False)
    options = {"model": "math", "prompt": "one two", "max_tokens": 4}
    (choice,) = client.completions.create(**options, logprobs=1, echo=True).choices
    assert choice.text == "one two" + reply.text
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[-4:] == pytest.approx(reply.logprobs, abs=1e-3)
    parts = list(client.completions.create(**options, echo=True, stream=True))
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert len(client.completions.create(**options, n=2, best_of=3, temperature=1.0).choices) == 2


def test_openai_responses(client, expected):
    def whole(turns):
        return client.responses.create(model="math", input=turns, max_output_tokens=LIMIT).output_text

    def streamed(turns):
        with client.responses.stream(model="math", input=turns, max_output_tokens=LIMIT) as events:
            return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    assert converse(whole) == converse(streamed) == expected("math")


@pytest.mark.parametrize("temperature", [0, 1])
def test_openai_structured_output(client, temperature):
    turns, options = [{"role": "user", "content": FIRST}], {"model": MIX, "temperature": temperature}
    parsed = client.chat.completions.parse(messages=turns, response_format=Answer, **options)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(messages=turns, response_format=Answer, **options) as events:
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Answer)
    assert isinstance(client.responses.parse(input=FIRST, text_format=Answer, **options).output_parsed, Answer)


def test_openai_embeddings(client, alone):
    texts = [FIRST, SECOND]
    for options in ({}, {"encoding_format": "float"}):  # by default base64
        found = client.embeddings.create(model="math", input=texts, **options)
        assert [one.embedding for one in found.data] == list(map(near, alone.embeddings(texts, "math").tolist()))


def test_openai_errors(client):
    openai = pytest.importorskip("openai")
    turns = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="maths", messages=turns)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="math", messages=turns, temperature=3)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


# --- litellm


@pytest.fixture
def litellm(server):
    """``litellm("completion", …)`` of litellm, with the server's address."""
    module = pytest.importorskip("litellm")

    def call(name, model="openai/math", **options):
        return getattr(module, name)(model=model, api_base=server.v1, api_key=server.key, **options)

    return call


def test_litellm(litellm, expected):
    def whole(turns):
        return litellm("completion", messages=turns, max_tokens=LIMIT).choices[0].message.content

    def streamed(turns):
        parts = litellm("completion", messages=turns, max_tokens=LIMIT, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts)

    assert converse(whole) == converse(streamed) == expected("math")


def test_litellm_structured_output(litellm):
    turns = [{"role": "user", "content": FIRST}]
    reply = litellm("completion", messages=turns, response_format=Answer)
    assert Answer.model_validate_json(reply.choices[0].message.content)


def test_litellm_embeddings(litellm, alone):
    found = litellm("embedding", input=[FIRST])
    assert found.data[0]["embedding"] == near(alone.embeddings([FIRST], "math")[0].tolist())


def test_litellm_responses(litellm, expected):
    def whole(turns):
        (item,) = litellm("responses", input=turns, max_output_tokens=16).output  # its least number
        return item.content[0].text

    assert converse(whole) == expected("math", 16)


@pytest.mark.parametrize("model", ["openai/math", "text-completion-openai/math"])
def test_litellm_text_completion(litellm, alone, model):
    (reply,) = alone.generate(["one two"], "math", max_new_tokens=4, chat=False)
    options = {"model": model, "prompt": "one two", "max_tokens": 4}
    assert litellm("text_completion", **options).choices[0].text == reply.text
    (choice,) = litellm("text_completion", **options, echo=True, logprobs=1).choices
    assert choice.text == "one two" + reply.text
    assert choice.logprobs.token_logprobs[-4:] == pytest.approx(reply.logprobs, abs=1e-3)
    parts = litellm("text_completion", **options, stream=True)
    assert "".join(part.choices[0].text or "" for part in parts) == reply.text


# --- LangChain


@pytest.fixture
def langchain(server):
    """``langchain("ChatOpenAI", …)`` -> a model of LangChain at the server's address."""
    module = pytest.importorskip("langchain_openai")

    def build(name, model="math", **options):
        return getattr(module, name)(model=model, base_url=server.v1, api_key=server.key, max_retries=0, **options)

    return build


@pytest.mark.parametrize("options", [{}, {"use_responses_api": False}, {"use_responses_api": True}])
def test_langchain(langchain, expected, options):
    model = langchain("ChatOpenAI", max_tokens=LIMIT, **options)

    def streamed(turns):
        return "".join(part.text for part in model.stream(turns))

    assert converse(lambda turns: model.invoke(turns).text) == converse(streamed) == expected("math")
    assert [reply.text for reply in model.batch([FIRST, FIRST])] == [expected("math")[0]] * 2
    reply = langchain("ChatOpenAI", max_tokens=LIMIT, logprobs=True, temperature=0, top_p=0.9, seed=1).invoke(FIRST)
    assert len(reply.response_metadata["logprobs"]["content"]) == reply.usage_metadata["output_tokens"]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_structured_output(langchain, responses):
    model = langchain("ChatOpenAI", use_responses_api=responses)
    assert isinstance(model.with_structured_output(Answer).invoke(FIRST), Answer)
    assert isinstance(model.with_structured_output(Answer.model_json_schema()).invoke(FIRST), dict)


def test_langchain_embeddings(langchain, server, alone):
    """By default LangChain sends ids of OpenAI's tokenizer."""
    expected = list(map(near, alone.embeddings([FIRST, SECOND], "math").tolist()))
    own_tokenizer = {"tiktoken_enabled": False, "tiktoken_model_name": str(server.base)}
    for options in ({"check_embedding_ctx_length": False}, own_tokenizer):
        model = langchain("OpenAIEmbeddings", **options)
        assert model.embed_documents([FIRST, SECOND]) == expected
        assert model.embed_query(FIRST) == expected[0]


def test_langchain_completions(langchain, alone):
    (reply,) = alone.generate(["one two"], "math", max_new_tokens=4, chat=False)
    model = langchain("OpenAI", max_tokens=4, temperature=0)
    assert model.invoke("one two") == "".join(model.stream("one two")) == reply.text
    found = langchain("OpenAI", max_tokens=4, n=2, best_of=3).generate(["one", "two"])
    assert [len(choices) for choices in found.generations] == [2, 2]


# --- Tools


@pytest.fixture
def caller(tmp_path, cache):
    """Server on a model that calls the tool `weather`, with the chat template of Qwen 2.5."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    model, tokenizer = scripted(call, real_template("qwen2_5"))
    settings = load_settings(None, state=tmp_path / "state", port=0, max_new_tokens=256)
    server = Live(Service(model, tokenizer, {}, settings, {}))
    yield f"{server.url}/v1"
    server.stop()


def weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_tools(caller, responses):
    module = pytest.importorskip("langchain_openai")
    model = module.ChatOpenAI(model="base", base_url=caller, api_key="none", use_responses_api=responses)
    bound = model.bind_tools([weather])
    reply = bound.invoke("Paris?")
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    streamed = [*bound.stream("Paris?")]
    assert sum(streamed[1:], streamed[0]).tool_calls[0]["args"] == {"city": "Paris"}
    result = {"role": "tool", "content": weather(**call["args"]), "tool_call_id": call["id"]}
    assert bound.invoke([{"role": "user", "content": "Paris?"}, reply, result]).tool_calls


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_forced_tools(caller, responses):
    module = pytest.importorskip("langchain_openai")
    model = module.ChatOpenAI(model="base", base_url=caller, api_key="none", use_responses_api=responses)
    assert isinstance(model.with_structured_output(Answer, method="function_calling").invoke("red?"), Answer)
    for choice in ("any", "Answer"):
        (call,) = model.bind_tools([Answer], tool_choice=choice, parallel_tool_calls=False).invoke("red?").tool_calls
        assert Answer(**call["args"])


def test_litellm_tools(caller):
    litellm = pytest.importorskip("litellm")
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    turns = [{"role": "user", "content": "Paris?"}]
    options = {"model": "openai/base", "api_base": caller, "api_key": "none", "tools": tools}
    message = litellm.completion(messages=turns, **options).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "content": "sunny", "tool_call_id": message.tool_calls[0].id}
    assert litellm.completion(messages=[*turns, message.model_dump(), result], **options).choices[0].message.tool_calls


# --- lm-eval

ITEMS = [("the sun", ["yes", "no", "sun"]), ("8 + 5", ["13", "14", "a"]), ("x" * 40, ["xx", "y", "z"])]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """``evaluate(task, model, **arguments)`` -> the harness's answers to each item."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "gold": 0} for question, choices in ITEMS]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'items.jsonl'}}}}}\ntest_split: test\n"
    question = 'doc_to_text: "{{question}}: "\n'
    (folder / "choice.yaml").write_text(
        f'task: tiny_choice\n{head}{question}output_type: multiple_choice\ndoc_to_choice: "{{{{choices}}}}"\n'
        'doc_to_target: "{{gold}}"\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "reply.yaml").write_text(
        f'task: tiny_reply\n{head}{question}output_type: generate_until\ndoc_to_target: "{{{{choices[0]}}}}"\n'
        'generation_kwargs: {until: ["e", "qz"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n'
    )
    (folder / "text.yaml").write_text(
        f'task: tiny_text\n{head}output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}]\n'
    )

    def call(task, model, arguments=None, **options):
        manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **options
        )
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        return [sample["filtered_resps"] for sample in samples]

    return call


@pytest.fixture
def harness_model(server):
    """The model of `sigmix lm-eval` with the server's base and experts."""
    from sigmix.integrations.lm_eval import SigmixLM

    return SigmixLM(base=str(server.base), bank=str(server.bank), mix=MIX, dtype="float32")


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 9}, {"num_concurrent": 3}, {"tokenized_requests": False}, {"tokenizer_backend": "remote"}],
    ids=lambda options: ",".join(options) or "default",
)
def test_local_completions(server, evaluate, harness_model, options):
    """Scores and answers are those of `sigmix lm-eval`."""
    arguments = {"model": MIX, "base_url": f"{server.v1}/completions", "max_length": 256, "max_retries": 1, **options}
    remote = options.get("tokenizer_backend") == "remote"
    arguments |= {"auth_token": server.key} if remote else {"tokenizer": str(server.base)}
    for task in ("tiny_choice", "tiny_text"):
        found = evaluate(task, "local-completions", arguments)
        expected = evaluate(task, harness_model)
        assert len(found) == len(ITEMS)
        for own, other in zip(found, expected, strict=True):
            if task == "tiny_choice":
                assert [str(greedy) for _, greedy in own] == [str(greedy) for _, greedy in other]
                own, other = ([float(score) for score, _ in answers] for answers in (own, other))
            assert own == pytest.approx(other, abs=1e-3)
    assert evaluate("tiny_reply", "local-completions", arguments) == evaluate("tiny_reply", harness_model)


def test_local_chat_completions(server, evaluate, harness_model):
    arguments = {"model": MIX, "base_url": f"{server.v1}/chat/completions", "max_retries": 1}
    found = evaluate("tiny_reply", "local-chat-completions", arguments, apply_chat_template=True)
    assert found == evaluate("tiny_reply", harness_model, apply_chat_template=True)


# --- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server, expected):
    def call(turns, stream):
        body = json.dumps({"model": "math", "messages": turns, "max_tokens": LIMIT, "stream": stream})
        words = ["curl", "-sS", "--fail-with-body", "-N", f"{server.v1}/chat/completions", "-d", "@-"]
        for header in (f"Authorization: Bearer {server.key}", "Content-Type: application/json"):
            words += ["-H", header]
        done = subprocess.run(words, input=body, capture_output=True, text=True, check=True, timeout=TIMEOUT)
        return done.stdout

    def streamed(turns):
        lines = [line[6:] for line in call(turns, True).split("\n") if line.startswith("data: {")]
        parts = [choice["delta"].get("content", "") for line in lines for choice in json.loads(line)["choices"]]
        return "".join(parts)

    assert converse(lambda turns: json.loads(call(turns, False))["choices"][0]["message"]["content"]) == expected(
        "math"
    )
    assert converse(streamed) == expected("math")

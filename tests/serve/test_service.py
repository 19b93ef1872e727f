"""Service without HTTP: strategies, context length, tokenization."""

from __future__ import annotations

import pytest
from helpers_adapt import big, engine_of, requests_of, routed
from helpers_serve import BODY, CHAT, bank, make_service, serving
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.adapt import TwoPass
from sigmix.errors import ContextError, PromptError, UnknownNameError
from sigmix.experts.expert import Expert

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def service(tmp_path):
    service = make_service(tmp_path, default_new_tokens=20, max_new_tokens=100, max_prompt_tokens=246)
    yield service
    service.close()


def test_strategies_of_a_bank(service):
    assert list(service.strategies) == ["A"]
    assert isinstance(service.strategies["A"], TwoPass)
    assert service.check_strategy("") == service.check_strategy("auto") == service.check_strategy("A") == "A"
    with pytest.raises(UnknownNameError) as error:
        service.check_strategy("B")
    assert "A" in str(error.value)


def test_an_unavailable_default_strategy(tmp_path):
    with pytest.raises(UnknownNameError) as error:
        make_service(tmp_path, strategy="bandit")
    assert "bandit" in str(error.value)


def test_empty_bank(tmp_path):
    service = make_service(tmp_path, experts={})
    (decision,) = service.strategies[service.default_strategy].decide(["one"])
    assert decision.mix.id == "base"
    service.close()


@pytest.mark.parametrize(
    "prompt, requested, expected",
    [(10, None, 20), (10, 50, 50), (10, 200, 100), (246, None, 10), (246, 10, 10), (246, 11, 10), (100, 10**9, 100)],
)
def test_number_of_new_tokens(service, prompt, requested, expected):
    assert service.fit_context([5] * prompt, requested) == expected


@pytest.mark.parametrize("prompt, requested", [(0, None), (247, 1), (256, None), (300, 10**9)])
def test_prompts_that_do_not_fit(service, prompt, requested):
    with pytest.raises(ContextError):
        service.fit_context([5] * prompt, requested)


def test_bare_lines_without_a_chat_template(service):
    service._tokenizer.chat_template = None
    turns = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]
    assert service.encode_chat(turns) == service.encode_text("one\ntwo")


def test_a_template_that_rejects_a_conversation(service):
    service._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError) as error:
        service.encode_chat([{"role": "user", "content": "one"}])
    assert "roles must alternate" in str(error.value)


def test_warm_up_covers_every_expert(service):
    service.start()
    assert service.ready
    assert set(service.registry) == set(bank())
    service.close()
    service.close()
    assert not service.ready


def test_requests_to_a_closing_server(tmp_path):
    with serving(tmp_path, expert_folders=[tmp_path]) as server:
        server.service.scheduler.close(5)
        for method, path, body in (("POST", CHAT, BODY), ("DELETE", "/v1/experts/math", None)):
            status, found, headers = server.call(method, path, body)
            assert (status, found["error"]["code"]) == (503, "closing")
            assert "retry-after" in headers
        assert server.call("GET", "/health")[0] == 503


def test_auto_chooses_an_expert_as_soon_as_it_is_added(tmp_path, cache):
    folder = tmp_path / "experts"
    engine = engine_of(build_tiny, build_tokenizer())
    for one in routed(engine).values():
        one.save_pretrained(folder / one.name)
    text = requests_of("arithmetic", 200, 1)[0]
    with serving(tmp_path, {}, model=big(build_tiny), expert_folders=[folder]) as client:
        service = client.service
        assert service.default_strategy == "A"
        for name, label in (("finder", "reading"), ("adder", "arithmetic")):
            assert client.call("POST", "/v1/experts", {"path": name})[0] == 201
            assert service.default_strategy == "D"
            assert "bandit" in service.strategies
            found = client.chat(requests_of(label, 300, 1)[0], model="auto")[1]
            assert found["sigmix"]["mix"] == name
        for strategy in ("A", "bandit"):
            assert service.check_strategy(strategy) == strategy
            scores = client.chat(text, model="auto", sigmix={"strategy": strategy})[1]["sigmix"]["scores"]
            assert set(scores) == {"arithmetic", "reading", "other"}
        assert client.call("DELETE", "/v1/experts/adder")[0] == 200
        assert client.chat(text, model="auto")[1]["sigmix"]["mix"] == "base"
        meta = {key: value for key, value in engine.bank["adder"].meta.items() if key != "domain"}
        Expert("reading", engine.bank["adder"].z, meta).save_pretrained(folder / "clash")  # the label of finder
        assert client.call("POST", "/v1/experts", {"path": "clash"})[0] == 400
        assert list(service.registry) == ["finder"]
        assert client.chat(requests_of("reading", 300, 1)[0], model="auto")[1]["sigmix"]["mix"] == "finder"

"""Keys, body limits, admission and second tries, without Ray's clusters and without a network."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from instella_ray.errors import UserError
from instella_ray.serving.access import BodyLimit, KeyCheck, check_address
from instella_ray.serving.admission import Gate
from instella_ray.serving.caller import CallerLimits
from instella_ray.serving.codes import pack, unpack
from instella_ray.serving.failures import ApiError, api_error
from instella_ray.serving.keys import KEYS_VARIABLE, ApiKeys
from instella_ray.serving.retry import CALLS, replica_failed
from instella_ray.serving.runner import DeadlineExceeded, EngineFailed
from instella_ray.serving.safety import Flagged
from instella_ray.serving.stream import due, report_every

KEY, OTHER = "correct-horse-battery", "another-key-of-ours"


def of_a_stage(error: Exception) -> RayTaskError:
    """``error`` as a handle raises it: pickled, wrapped, and a class of its own."""
    return RayTaskError("generate", "Traceback ...", pickle.loads(pickle.dumps(error))).as_instanceof_cause()


# --- who may call


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_address(host, ApiKeys())


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.nip.io"]
)
def test_every_other_address_does(host: str) -> None:
    with pytest.raises(UserError, match="there are no API keys"):
        check_address(host, ApiKeys())
    check_address(host, ApiKeys([KEY]))


# --- what stands before the routes


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the size of what it was sent."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(app: Any, path: str = "/v1/models", client: str = "127.0.0.1", **request: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return await http.post(path, **request)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {OTHER}"}, 200),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"x-api-key": KEY}, 401),
    ],
)
def test_only_a_key_opens(headers: dict[str, str], status: int) -> None:
    response = ask(KeyCheck(reads_all, ApiKeys([KEY, OTHER]), CallerLimits(1)), headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_page_and_the_probe_need_no_key_and_nothing_that_looks_like_them() -> None:
    app = KeyCheck(reads_all, ApiKeys([KEY]), CallerLimits(1))
    assert [ask(app, path).status_code for path in ("/", "/healthz")] == [200, 200]
    assert [ask(app, path).status_code for path in ("/healthz/", "/v1", "/openapi.json")] == [401, 401, 401]


def test_without_keys_other_machines_are_refused_whatever_they_ask() -> None:
    app = KeyCheck(reads_all, ApiKeys(), CallerLimits(1))
    assert [ask(app, client=here).status_code for here in ("127.0.0.1", "::1")] == [200, 200]
    response = ask(app, "/", client="10.0.0.7")
    assert response.status_code == 403 and KEYS_VARIABLE in response.json()["error"]["message"]


def chunks(count: int, size: int = 1000) -> Callable[[], Any]:
    async def chunked() -> Any:
        for _ in range(count):
            yield bytes(size)

    return chunked


def test_a_body_may_be_as_large_as_the_limit_and_not_a_byte_more() -> None:
    app = BodyLimit(reads_all, 10_000)
    assert ask(app, content=bytes(10_000)).text == "10000"
    assert ask(app, content=chunks(10)()).text == "10000"
    for content in (bytes(10_001), chunks(11)()):
        response = ask(app, content=content)
        assert response.status_code == 413 and response.json()["error"]["param"] == "body"
    # A length that lies is not believed.
    assert ask(app, content=chunks(11)(), headers={"content-length": "5"}).status_code == 413


def test_a_body_that_never_ends_is_not_waited_for() -> None:
    async def endless() -> Any:
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    response = ask(BodyLimit(reads_all, 10_000, timeout_s=0.1), content=endless())
    assert response.status_code == 408 and response.json()["error"]["code"] == "body_timeout"


# --- admission


def test_a_gate_lets_whole_requests_in_or_none_of_their_images() -> None:
    gate = Gate(4)
    with gate.enter(3):
        with pytest.raises(ApiError) as caught, gate.enter(2):
            raise AssertionError("let in")
        assert caught.value.status == 429 and gate.inside == 3
        with gate.enter(1):
            assert gate.inside == 4
    assert gate.inside == 0
    with pytest.raises(ZeroDivisionError), gate.enter(4):
        _ = 1 / 0
    assert gate.inside == 0


def test_retry_after_is_how_long_the_images_in_the_way_take() -> None:
    clock = [0.0]
    gate = Gate(4, clock=lambda: clock[0])

    def retry_after(images: int) -> str:
        with pytest.raises(ApiError) as caught, gate.enter(images):
            raise AssertionError("let in")
        return caught.value.headers["Retry-After"]

    with gate.enter(4):
        assert retry_after(1) == "1"
    for clock[0] in (2.0, 4.0, 6.0, 8.0):
        with gate.enter(1):
            assert gate.inside == 1
    clock[0] = 10.0
    with gate.enter(4):  # eight images have left in ten seconds
        assert retry_after(1) == "2" and retry_after(4) == "5"
    clock[0] = 1e6
    with gate.enter(4):
        assert retry_after(4) == "60"


# --- second tries


def steady(failures: int) -> float:
    """Instead of the jitter, which is random."""
    return 1.0


def run_tries(failures: list[Exception], *, deadline: float = math.inf, **changes: Any) -> tuple[Any, int]:
    """What came of a call that fails in these ways before it works, and how often it was made."""
    calls = 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        if calls <= len(failures):
            raise failures[calls - 1]
        return "image"

    try:
        policy = replace(CALLS, **{"first_wait_s": 0.0, **changes})
        return asyncio.run(policy.call_async(call, deadline=deadline)), calls
    except Exception as error:
        return error, calls


def test_lost_replicas_are_replaced_by_another_try_three_in_all() -> None:
    lost = [ActorDiedError(), of_a_stage(EngineFailed("broken")), ActorDiedError()]
    assert run_tries(lost[:2]) == ("image", 3)
    assert run_tries(lost) == (lost[2], 3)


@pytest.mark.parametrize("error", [UserError("no"), DeadlineExceeded("late"), Flagged("no"), ValueError("a bug")])
def test_what_would_fail_again_is_not_tried_again(error: Exception) -> None:
    assert run_tries([of_a_stage(error)])[1] == 1


def test_no_try_begins_after_the_deadline() -> None:
    for wait_s, tries in [(1, 1), (0.01, 2)]:
        changes = {"first_wait_s": wait_s, "jitter": steady, "clock": lambda: 99.5}
        assert run_tries([ActorDiedError()], deadline=100, **changes)[1] == tries


def test_pauses_double() -> None:
    slept: list[float] = []

    async def call() -> None:
        raise ActorDiedError

    async def main() -> None:
        with pytest.raises(ActorDiedError), pytest.MonkeyPatch.context() as patch:
            sleep = asyncio.sleep
            patch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or sleep(0))
            await replace(CALLS, tries=4, jitter=steady).call_async(call)

    asyncio.run(main())
    assert slept == [0.2, 0.4, 0.8]


def test_a_lost_replica_is_known_behind_every_wrapping() -> None:
    upstream = RuntimeError("an upstream actor died")
    upstream.__cause__ = ActorDiedError()
    circle = ValueError("round")
    circle.__cause__ = circle
    assert replica_failed(upstream) and replica_failed(of_a_stage(EngineFailed("x")))
    assert not replica_failed(circle)


# --- failures as answers


def errors() -> Iterator[tuple[BaseException, int, str | None]]:
    yield UserError("prompt: too long"), 400, None
    yield Flagged("withheld"), 400, "content_policy_violation"
    yield DeadlineExceeded("late"), 504, "deadline_exceeded"
    yield TimeoutError(), 504, "deadline_exceeded"
    yield BackPressureError(3, 3), 429, "overloaded"
    yield EngineFailed("broken"), 503, "replica_failed"
    yield ValueError("secret detail"), 500, None


@pytest.mark.parametrize(("error", "status", "code"), errors())
def test_every_failure_has_an_answer_of_its_own(error: Exception, status: int, code: str | None) -> None:
    for given in (error, of_a_stage(error)):
        answer = api_error(given)
        assert (answer.status, answer.code) == (status, code)
        assert "Traceback" not in answer.message and "secret" not in answer.message
        assert ("Retry-After" in answer.headers) == (status in (429, 503))


# --- codes and previews


def test_codes_survive_the_way_as_text() -> None:
    codes = np.random.default_rng(0).integers(0, 2, (128, 64), dtype=np.uint8)
    assert np.array_equal(unpack(pack(codes), 128, 64), codes)
    assert len(pack(codes)) == 1368  # base64 of 1,024 bytes
    with pytest.raises(UserError, match="zeros after the last of 5 bits"):
        unpack("/w==", 1, 5)
    assert unpack("+A==", 1, 5).tolist() == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 1000])
@pytest.mark.parametrize("partial", range(9))
def test_previews_are_spread_and_none_is_promised_that_cannot_be(steps: int, partial: int) -> None:
    every = report_every(steps, partial)
    reports = [step for step in range(every, steps, every)]  # the last step is the image itself
    shown: list[int] = []
    for step in reports:
        if len(shown) < due(step, steps, partial):
            shown.append(step)
    assert len(shown) == min(partial, len(reports))
    assert len(reports) <= 40
    if partial and steps >= 40:
        gaps = np.diff([0, *shown, steps])
        assert gaps.max() <= 2 * gaps.min() + every

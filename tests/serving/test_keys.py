"""API keys: their file and its faults, the limits of each, and the command that makes one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from instella_ray import cli
from instella_ray.errors import UserError
from instella_ray.serving import keys as keys_module
from instella_ray.serving.api_error import ApiError
from instella_ray.serving.caller import CallerLimits, RequestWindow
from instella_ray.serving.config import ServeArgs
from instella_ray.serving.keys import KEYS_VARIABLE, UNNAMED, ApiKey, ApiKeys

KEY, OTHER = "correct-horse-battery", "another-key-of-ours"


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, key: str = KEY, **limits: Any) -> dict[str, Any]:
    return {"name": name, "sha256": sha(key), **limits}


# --- the file


def test_keys_come_from_the_environment_and_a_plain_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{OTHER}\n\n")
    monkeypatch.setenv(KEYS_VARIABLE, f" {KEY}, ,")
    keys = ApiKeys.load(str(file))
    assert keys
    for right in (KEY, OTHER):
        found = keys.find(right.encode())
        assert found is not None and found.name == UNNAMED and found.models is None
    for wrong in (b"", KEY[:-1].encode(), KEY.upper().encode(), b"\xff", b"# of the team"):
        assert keys.find(wrong) is None
    assert KEY.encode() not in pickle.dumps(keys), "what Serve records must not hold the key"
    monkeypatch.delenv(KEYS_VARIABLE)
    assert not ApiKeys.load()


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps, lambda x: json.dumps(x, indent=1), lambda x: f"# a\n{x}"])
def test_keys_come_from_entries(dump: Callable[[Any], str], tmp_path: Path) -> None:
    entries = [entry("alice", requests_per_minute=6, models=["ar"]), entry("bob@example.org", OTHER)]
    (tmp_path / "keys").write_text(dump(entries))
    keys = ApiKeys(file=str(tmp_path / "keys"), models=["ar", "diffusion"])
    alice, bob = keys.find(KEY.encode()), keys.find(OTHER.encode())
    assert alice is not None and (alice.name, alice.requests_per_minute, alice.models) == ("alice", 6, ("ar",))
    assert bob is not None and (bob.name, bob.concurrent_images) == ("bob@example.org", None)
    assert keys.find(sha(KEY).encode()) is None, "the hash is no key"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{KEY}\nhunter2\n", "line 2: expected a key of at least 16 ASCII characters, without spaces"),
        ("# nothing\n", "holds no key"),
        ("[]", "holds no key"),
        ("- hunter2 is the key\n", "line 1: expected an entry with name and sha256"),
        (f"- name: alice\n  sha256: {KEY}\n", "line 1: sha256: expected the key's SHA-256, 64 hexadecimal digits"),
        (f"- name: a\n  sha256: {sha(OTHER)}\n- name: b\n", "line 3: sha256: expected the key's SHA-256"),
        (yaml.safe_dump([entry("a"), entry("a", OTHER)]), "line 3: name: is that of line 1, expected another one"),
        (yaml.safe_dump([entry("a"), entry("b")]), "line 3: sha256: is that of line 1, expected another one"),
        (yaml.safe_dump([entry("a", models=["flux"])]), "line 1: models: 'flux' is not served, expected one of ar"),
        (yaml.safe_dump([entry("a", models=[])]), "line 1: 'models' = []: Tuple should have at least 1 item"),
        (yaml.safe_dump([entry("a", requests_per_minute=0)]), "'requests_per_minute' = 0: Input should be greater"),
        (yaml.safe_dump([entry("a", rpm=1)]), "line 1: unknown key 'rpm'"),
        (yaml.safe_dump([entry("a b")]), "line 1: 'name' = 'a b': String should match"),
        (yaml.safe_dump([entry(UNNAMED)]), "line 1: name: unnamed stands for requests without a named key"),
        ("- name: alice\n  sha256: [\n", "line 3: expected a YAML or JSON list of entries"),
        ("---\nname: alice\n", "line 1: expected a list of entries with name and sha256"),
    ],
)
def test_a_fault_is_told_by_its_line_without_any_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        ApiKeys(file=str(file), models=["ar"])
    said = str(caught.value)
    assert said.startswith(f"api_keys_file {file}") and message in said and "\n" not in said
    assert KEY not in said and "hunter2" not in said


def test_a_file_that_is_missing_and_a_short_key_of_the_variable_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ApiKeys(file=str(tmp_path / "none"))
    monkeypatch.setenv(KEYS_VARIABLE, "hunter2")
    with pytest.raises(UserError, match="at least 16") as caught:
        ApiKeys.load()
    assert "hunter2" not in str(caught.value)


def test_a_change_is_read_and_a_fault_keeps_the_keys_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(yaml.safe_dump([entry("alice")]))
    keys = pickle.loads(pickle.dumps(ApiKeys([OTHER], str(file))))
    with caplog.at_level(logging.INFO, "instella_ray"):
        keys.reload()
        assert not caplog.records
        file.write_text("- name: alice\n  sha256: x\n")
        for _ in range(3):
            keys.reload()
            assert keys.find(KEY.encode()) is not None
        (record,) = caplog.records
        assert record.levelno == logging.ERROR and "line 1: sha256: expected" in record.getMessage()
        file.unlink()
        keys.reload()
        assert keys.find(KEY.encode()) is not None and "cannot be read" in caplog.records[-1].getMessage()
        file.write_text(yaml.safe_dump([entry("bob", "a-third-key-of-ours")]))
        keys.reload()
    assert keys.find(KEY.encode()) is None and keys.find(b"a-third-key-of-ours") is not None
    assert keys.find(OTHER.encode()) is not None, "the variable's keys are no part of the file"
    assert "1 keys" in caplog.records[-1].getMessage()


def test_the_file_is_watched_without_holding_up_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a read that never returns, as of a network file system that hangs."""
    monkeypatch.setattr(keys_module, "RELOAD_S", 0.01)
    file = tmp_path / "keys"
    file.write_text(KEY)
    keys = ApiKeys(file=str(file))

    async def run() -> None:
        watcher = asyncio.create_task(keys.watch())
        file.write_text(OTHER)
        async with asyncio.timeout(20):
            while keys.find(OTHER.encode()) is None:
                await asyncio.sleep(0.001)
        assert keys.find(KEY.encode()) is None
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await asyncio.wait_for(ApiKeys([KEY]).watch(), 5)

    asyncio.run(run())


# --- limits


@given(
    limit=st.integers(1, 5),
    pauses=st.lists(st.integers(0, 40), min_size=1, max_size=60),
)
def test_no_minute_has_more_requests_than_the_limit_and_the_wait_is_exact(limit: int, pauses: list[int]) -> None:
    now = [0]
    window, admitted = RequestWindow(lambda: now[0]), list[int]()
    for pause in pauses:
        now[0] += pause
        in_window = [moment for moment in admitted if moment > now[0] - 60]
        try:
            window.admit(limit)
        except ApiError as error:
            assert len(in_window) == limit, "refused below the limit"
            assert (error.status, error.code) == (429, "rate_limit_exceeded")
            wait = error.retry_after_s
            assert wait is not None and 0 < wait <= 60 and error.headers["Retry-After"] == str(int(wait))
            # After the wait there is room, and a second before there is none.
            assert len([m for m in admitted if m > now[0] + wait - 60]) < limit
            assert len([m for m in admitted if m > now[0] + wait - 1 - 60]) == limit
        else:
            assert len(in_window) < limit
            admitted.append(now[0])


@given(
    limit=st.integers(1, 8),
    replicas=st.integers(1, 4),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=40),
)
def test_images_in_progress_keep_to_the_share(limit: int, replicas: int, steps: list[tuple[bool, int]]) -> None:
    """On one replica: never above the share, but for a single request up to the limit; and all is given back."""
    limits, share = CallerLimits(replicas, lambda: 0.0), math.ceil(limit / replicas)
    key, inside = ApiKey(**entry("a", concurrent_images=limit)), list[tuple[int, ExitStack]]()
    for enter, images in steps:
        gate = limits.caller(key, counted=False).images
        before = sum(n for n, _ in inside)
        if not enter and inside:
            inside.pop(0)[1].close()
        elif enter:
            stack = ExitStack()
            try:
                stack.enter_context(gate.enter(images))
            except ApiError as error:
                assert error.code == "rate_limit_exceeded"
                assert before + images > share and (before or images > limit)
            else:
                assert before + images <= share or (before == 0 and images <= limit)
                inside.append((images, stack))
        assert gate.inside == sum(n for n, _ in inside)
    for _, stack in inside:
        stack.close()
    assert limits.caller(key, counted=False).images.inside == 0


def test_a_rate_is_divided_among_the_replicas_as_the_endpoints_images_are() -> None:
    args = ServeArgs(tokenizer="a", models={}, ingress_replicas=2, limits={"images": 1})
    replicas = [CallerLimits(args.ingress_replicas, lambda: 0.0) for _ in range(args.ingress_replicas)]
    for limit in (1, 4, 5):
        key = ApiKey(**entry(f"of-{limit}", requests_per_minute=limit))
        for replica in replicas:
            for _ in range(args.share(limit)):
                replica.caller(key, counted=True)
            with pytest.raises(ApiError, match="requests a minute"):
                replica.caller(key, counted=True)
            assert replica.caller(key, counted=False).name == key.name


def test_changed_limits_hold_for_the_requests_already_counted() -> None:
    limits = CallerLimits(1, lambda: 0.0)
    few, more = (ApiKey(**entry("a", requests_per_minute=n, concurrent_images=n)) for n in (1, 2))
    with limits.caller(few, counted=True).images.enter(1):
        with pytest.raises(ApiError):
            limits.caller(few, counted=True)
        with limits.caller(more, counted=True).images.enter(1):
            with pytest.raises(ApiError):
                limits.caller(more, counted=True)
        assert limits.caller(ApiKey(**entry("a")), counted=True).images.capacity == math.inf


# --- the command


def test_the_command_prints_an_entry_that_the_file_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = {}
    for name, flags in {"alice": ["--requests-per-minute", "60", "--models", "ar", "diffusion"], "bob": []}.items():
        assert cli.main(["api-key", name, *flags]) == 0
        out, err = capsys.readouterr()
        made[name] = err.removeprefix("key: ").strip()
        assert made[name] not in out and len(made[name]) > 40
        with file.open("a") as keys:
            keys.write(out)
    found = ApiKeys(file=str(file), models=["diffusion", "ar"])
    alice, bob = (found.find(key.encode()) for key in made.values())
    assert alice is not None and bob is not None and (alice.name, bob.name) == ("alice", "bob")
    assert alice.requests_per_minute == 60 and alice.models == ("ar", "diffusion") and bob.models is None
    assert cli.main(["api-key", "alice", "--concurrent-images", "0"]) == 2
    assert "'concurrent_images' = 0: Input should be greater" in capsys.readouterr().err

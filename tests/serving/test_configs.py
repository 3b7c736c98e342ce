"""The endpoint's configuration files: those of the job, and the one in Ray Serve's own form."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from instella_ray.errors import UserError

from ..kit.project import DEPLOY
from ..kit.serve_config import check_serve_config


def deploy_file() -> dict[str, Any]:
    return yaml.safe_load(DEPLOY.read_text())


def test_the_deploy_file_is_one_that_serve_reads_wholly() -> None:
    check_serve_config(deploy_file())
    host = deploy_file()["http_options"]["host"]
    assert host == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    [
        ("porxy_location",),
        ("http_options", "prot"),
        ("applications", 0, "route_perfix"),
        ("applications", 0, "args", "tokeniser"),
        ("applications", 0, "args", "models", "diffusion", "slotz"),
        ("applications", 0, "args", "models", "diffusion", "defaults", "steps"),
        ("applications", 0, "args", "limits"),
    ],
)
def test_a_misspelt_key_at_any_depth_is_found(path: tuple[Any, ...]) -> None:
    data = copy.deepcopy(deploy_file())
    place: Any = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = {"nn": 3}
    with pytest.raises((AssertionError, pydantic.ValidationError, UserError)):
        check_serve_config(data)


def test_serve_knows_the_type_of_the_arguments() -> None:
    """What ``serve run`` and ``serve deploy`` do with ``args``: validate them into the builder's annotated class."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    from instella_ray.serving.app import build

    args = deploy_file()["applications"][0]["args"]
    with pytest.raises(UserError, match="models/bit: not a model folder"):
        call(build, args)
    with pytest.raises(pydantic.ValidationError, match="tokeniser"):
        call(build, {**args, "tokeniser": "x"})


def test_the_job_refuses_to_listen_for_others_without_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import ray

    from instella_ray.errors import run_main

    from ..kit.project import job

    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("INSTELLA_API_KEYS", raising=False)
    monkeypatch.setattr(ray, "init", started)
    argv = ["--config", str(DEPLOY.with_name("tiny.yaml")), "--set", "host=0.0.0.0"]
    assert run_main(lambda: job("serve")(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: host 0.0.0.0: ") and "INSTELLA_API_KEYS" in error and error.count("\n") == 1
    # With keys it gets as far as the model folders, which are placeholders here.
    monkeypatch.setenv("INSTELLA_API_KEYS", "a-key-of-sixteen-characters")
    assert run_main(lambda: job("serve")(argv)) == 2
    assert "MODEL_FOLDER_OF_THE_TOKENIZER: not a model folder" in capsys.readouterr().err

"""The endpoint as an application of Serve, looked at before it is deployed: what is refused, how each stage is laid out."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from instella_ray.errors import UserError, run_main
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import save_model, weight_hash
from instella_ray.serving.app import build
from instella_ray.serving.config import Autoscaling, ModelArgs, RequestLimits, ServeArgs
from instella_ray.serving.local import build_local
from instella_ray.serving.server import serve_forever

from ..kit.endpoint import deployed, serve_args
from ..kit.head import free_port
from ..kit.models import TINY_BIT, make_generator
from ..kit.project import job


@pytest.mark.parametrize("build", [build, build_local])
def test_models_that_do_not_belong_together_are_refused(
    folders: dict[str, str], tmp_path: Path, build: Callable[[ServeArgs], object]
) -> None:
    with pytest.raises(UserError, match="sizes 36: not a multiple of 8"):
        build(serve_args(folders, sizes=(36,)))
    torch.manual_seed(1)
    save_model(tmp_path, BIT(TINY_BIT))
    with pytest.raises(UserError, match="another tokenizer"):
        build(serve_args(folders, tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match="not a model folder"):
        build(serve_args(folders, tokenizer=str(tmp_path / "none")))


@pytest.mark.parametrize("build", [build, build_local])
def test_damaged_weights_and_other_tokens_are_refused(
    folders: dict[str, str], tmp_path: Path, build: Callable[[ServeArgs], object]
) -> None:
    damaged = shutil.copytree(folders["ar"], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"damaged/model\.safetensors: not a complete safetensors file"):
        build(serve_args(folders, models={"ar": ModelArgs(path=str(damaged))}))
    hash_of_bit = weight_hash(folders["bit"])
    wide = make_generator(tmp_path / "wide", hash_of_bit, "ar", bits_per_token=TINY_BIT.bits_per_token + 1)
    with pytest.raises(UserError, match=r"models\.ar: .*/wide generates 4 tokens of 7 bits, tokenizer .* has 4 of 6"):
        build(serve_args(folders, models={"ar": ModelArgs(path=wide)}))


@pytest.mark.nightly
@pytest.mark.ray
def test_what_cannot_be_placed_and_a_second_endpoint_are_refused(
    ray_session: None, folders: dict[str, str], serve_url: str
) -> None:
    args = serve_args(folders, models={"ar": ModelArgs(path=folders["ar"], num_gpus=1)})
    with pytest.raises(UserError, match=r"^app: needs 1 GPU, the cluster has 0 GPUs; lower num_cpus, num_gpus or"):
        serve_forever(args, "127.0.0.1", free_port(), 0, local=False)
    with deployed(serve_args(folders), "first", "/first"):
        with pytest.raises(
            UserError, match=rf"this Ray already serves first \(diffusion, ar\) on {serve_url}; stop it"
        ):
            serve_forever(serve_args(folders), "127.0.0.1", free_port(), 0, local=False)


def test_an_occupied_port_is_refused_in_one_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "serve.yaml"
        config.write_text(f"app: {{tokenizer: none, models: {{a: {{path: none}}}}}}\nport: {port}\n")
        assert run_main(lambda: job("serve")(["--config", str(config)])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: port {port}: cannot listen on 127.0.0.1 (Address already in use)")
    with pytest.raises(UserError, match="not a model folder"):
        job("serve")(["--config", str(config)])


@pytest.mark.parametrize("build", [build, build_local])
def test_settings_that_contradict_are_refused(folders: dict[str, str], build: Callable[[ServeArgs], object]) -> None:
    with pytest.raises(UserError, match=r"limits.images 64: models.diffusion admits at most 4 images"):
        build(serve_args(folders, model={"slots": 2, "queue": 0}))
    for compilation in ("graphs", "compile+graphs"):
        with pytest.raises(UserError, match=re.escape(f"compilation {compilation}: needs a GPU")):
            build(serve_args(folders, model={"compilation": compilation}))
    with pytest.raises(UserError, match=r"more than limits\.steps 10"):
        build(serve_args(folders, limits=RequestLimits(steps=10)))
    with pytest.raises(UserError, match="expected at least one generator"):
        build(serve_args(folders, models={}))
    with pytest.raises(ValueError, match="min_replicas"):
        Autoscaling(min_replicas=5, max_replicas=2)


def test_every_stage_has_its_own_size(folders: dict[str, str]) -> None:
    scaling = Autoscaling(min_replicas=2, max_replicas=3, target_load=0.5)
    models = {
        "small": ModelArgs(path=folders["ar"], slots=4, queue=60, num_cpus=0.5),
        "large": ModelArgs(path=folders["diffusion"], slots=8, autoscaling=scaling, batch_invariant=False),
    }
    args = serve_args(folders, models=models, decoder={"file_threads": 5})
    app = build(ServeArgs.model_validate(args.model_dump()))
    small, large = (app._bound_deployment.init_args[-1][name]._bound_deployment for name in models)
    assert (small.num_replicas, small.max_ongoing_requests, small.max_queued_requests) == (1, 68, 128)
    assert small.ray_actor_options["num_cpus"] == 0.5 and large.ray_actor_options["num_cpus"] == 0.1
    config = large._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (2, 3)
    assert config.policy.policy_kwargs == {"utilisation": 0.5}
    options = large.init_kwargs["options"]
    assert options.batch_invariant is False and options.slots == 8
    assert app._bound_deployment.init_args[2]._bound_deployment.init_kwargs["file_threads"] == 5
    # Each of the two replicas of the ingress may admit 64 images, the largest request.
    assert app._bound_deployment.num_replicas == 2 and [args.share(n) for n in (68, 300)] == [64, 150]
    # Nothing that may still meet its deadline is ended by a replica that leaves.
    assert large._deployment_config.graceful_shutdown_timeout_s > args.limits.timeout_s

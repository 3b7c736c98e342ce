"""What to compute with: the choice on machines with and without a GPU, and refusals that name the thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from instella_ray import accelerator
from instella_ray.accelerator import compute_dtype, device_label, fast_bf16, hardware_summary, pick_device
from instella_ray.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "Some GPU")


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert pick_device() == pick_device("auto") == pick_device("cpu") == CPU


def test_with_a_gpu_auto_is_the_gpu_and_the_cpu_can_still_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    assert pick_device() == pick_device("cuda") == CUDA
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=f"^device '{name}': PyTorch sees no GPU on this machine$"):
        pick_device(name)


def test_a_number_past_the_last_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"^device 'cuda:2': PyTorch sees 2 GPU\(s\) on this machine, numbered from 0$"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu0", "rocm", "meta", "mps", "xpu:0"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^device '{name}': expected auto, cpu, cuda or cuda:N$"):
        pick_device(name)


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", "", False),
        ("AuthenticAMD", "fpu avx2 avx512f avx512_vnni", False),
        ("AuthenticAMD", "avx512_bf16_not", False),
        ("AuthenticAMD", "avx2 avx512_bf16", True),
        ("GenuineIntel", "avx2 avx512_bf16", False),
        ("GenuineIntel", "avx512_bf16 amx_tile amx_bf16 amx_int8", True),
        ("", "amx_bf16", True),
    ],
)
def test_bfloat16_follows_the_processor(monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, fast: bool) -> None:
    assert fast_bf16(flags.split(), vendor) is fast
    monkeypatch.setattr(accelerator, "_cpu_info", {"flags": flags, "vendor_id": vendor}.get)
    assert compute_dtype(CPU) == (torch.bfloat16 if fast else torch.float32)
    assert compute_dtype(CUDA) == torch.bfloat16
    for device in (CPU, CUDA):
        assert compute_dtype(device, "fp32") == torch.float32
        assert compute_dtype(device, "bf16") == torch.bfloat16


@pytest.mark.skipif(not os.environ.get("INSTELLA_TEST_BF16"), reason="no processor is pretended")
@pytest.mark.process
def test_a_pretended_processor_is_that_of_every_process() -> None:
    expected = {"yes": torch.bfloat16, "no": torch.float32}[os.environ["INSTELLA_TEST_BF16"]]
    assert compute_dtype(CPU) == expected
    code = "import torch, instella_ray.accelerator as a; print(a.compute_dtype(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


def test_other_precisions_are_refused() -> None:
    with pytest.raises(UserError, match=r"^precision 'fp16': expected auto, fp32 or bf16$"):
        compute_dtype(CPU, "fp16")  # type: ignore[arg-type]


def test_the_summary_says_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    summary = hardware_summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["processor"] == device_label(CPU) != ""
    assert summary["cores"] >= 1 and 0 < summary["memory_gib"] < 2**15
    assert summary["torch"] == torch.__version__ and summary["python"].startswith("3.")
    assert summary["gpus"] == []
    gpus(monkeypatch, 3)
    assert hardware_summary()["gpus"] == ["Some GPU"] * 3


@pytest.mark.parametrize(("hip", "kind"), [(None, "CUDA"), ("7.1.0", "ROCm")])
def test_a_gpu_is_named_with_its_platform(monkeypatch: pytest.MonkeyPatch, hip: str | None, kind: str) -> None:
    gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert device_label(CUDA) == f"Some GPU ({kind})"


def test_a_machine_that_tells_nothing_of_its_processor_still_has_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_cpu_info", lambda key: "")
    assert device_label(CPU) and compute_dtype(CPU) == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_found_and_computes() -> None:
    device = pick_device()
    assert device.type == "cuda" and device_label(device).endswith(("(CUDA)", "(ROCm)"))
    assert len(hardware_summary()["gpus"]) == torch.cuda.device_count()
    assert torch.ones(2, 2, device=device, dtype=compute_dtype(device)).sum().item() == 4

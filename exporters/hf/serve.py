"""Files that start a server on an exported Hugging Face folder: Triton, KServe, Kubernetes. Filled in, not templates.

Triton and the Deployment find the folder at /mnt/models/NAME; KServe mounts it at /mnt/models itself. None of these
files was run by this project: they are written from the readers' documentation (Triton vLLM backend, KServe 0.20
InferenceService, vLLM's Kubernetes page) and parsed back before the export is published.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from compress.plan import KvScheme
from exporters.sizing.predict import PREFILL_TOKENS

MOUNT = "/mnt/models"
VLLM_IMAGE = "vllm/vllm-openai:v0.24.0"
# An INT8 KV cache is right in versions after `kv_cache.LAST_WRONG_VLLM`; this is the one whose documentation was read.
VLLM_IMAGE_KV = "vllm/vllm-openai:v0.32.0"
PORT = 8000
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What the files are filled in from. share: of the GPU's memory that the server may take. kv: of the cache."""

    name: str
    context: int
    batch: int
    share: float
    dtype: str
    weight_bytes: int
    gpu: bool
    kv: KvScheme | None = None

    @property
    def image(self) -> str:
        """The container image of vLLM."""
        return VLLM_IMAGE if self.kv is None else VLLM_IMAGE_KV

    @property
    def label(self) -> str:
        """The name as Kubernetes wants it for a Service: RFC 1035, a letter first, at most 63 characters."""
        text = re.sub(r"[^a-z0-9-]+", "-", self.name.lower()).strip("-") or "model"
        text = text if text[0].isalpha() else f"model-{text}"
        return text[:63].strip("-")

    @property
    def memory(self) -> str:
        """Host memory for the pod: the weights pass through it once, beside 8 GiB of Python and CUDA."""
        return f"{math.ceil(self.weight_bytes / _GIB) + 8}Gi"

    def engine(self) -> dict[str, Any]:
        """vLLM's engine arguments. max_num_batched_tokens is what sizing counted on."""
        arguments: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": self.context,
            "max_num_seqs": self.batch,
            "max_num_batched_tokens": max(PREFILL_TOKENS, self.batch),
            "enable_chunked_prefill": True,
        }
        if self.kv is not None:
            arguments["kv_cache_dtype"] = self.kv.label()
        if self.gpu:
            arguments["gpu_memory_utilization"] = self.share
        return arguments


def files(serving: Serving) -> dict[str, str]:
    """Relative path -> text of every file under `serve/`."""
    triton = f"triton/{serving.label}"
    return {
        f"{triton}/1/model.json": json.dumps(
            {"model": f"{MOUNT}/{serving.label}", **serving.engine(), "enforce_eager": False}, indent=2
        )
        + "\n",
        f"{triton}/config.pbtxt": triton_config(serving),
        "kserve.yaml": yaml.safe_dump(inference_service(serving), sort_keys=False),
        "kubernetes.yaml": yaml.safe_dump_all([deployment(serving), service(serving)], sort_keys=False),
    }


def triton_config(serving: Serving) -> str:
    """config.pbtxt: the backend fills in its inputs and outputs; one instance, placed by vLLM itself."""
    return (
        f'name: "{serving.label}"\nbackend: "vllm"\nmodel_transaction_policy {{\n  decoupled: true\n}}\n'
        "instance_group [\n  {\n    count: 1\n    kind: KIND_MODEL\n  }\n]\n"
    )


def inference_service(serving: Serving) -> dict[str, Any]:
    """A KServe InferenceService on the Hugging Face runtime, whose back end is vLLM."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": serving.label},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "huggingface"},
                    "args": [f"--model_name={serving.label}", f"--model_dir={MOUNT}", *flags(serving)],
                    "storageUri": f"pvc://models/{serving.label}",
                    "resources": _resources(serving),
                }
            }
        },
    }


def deployment(serving: Serving) -> dict[str, Any]:
    """A Kubernetes Deployment of vLLM's OpenAI server over a volume claim called `models`."""
    container = {
        "name": "vllm",
        "image": serving.image,
        "args": [
            f"--model={MOUNT}/{serving.label}",
            f"--served-model-name={serving.label}",
            f"--port={PORT}",
            *flags(serving),
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": _resources(serving),
        # Loading weights and capturing graphs takes minutes: the startup probe allows 20.
        "startupProbe": _probe(seconds=10, failures=120),
        "readinessProbe": _probe(seconds=5, failures=3),
        "livenessProbe": _probe(seconds=10, failures=6),
        "volumeMounts": [
            {"name": "models", "mountPath": MOUNT, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": serving.label, "labels": {"app": serving.label}},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": serving.label}},
            "template": {
                "metadata": {"labels": {"app": serving.label}},
                "spec": {
                    "containers": [container],
                    "volumes": [
                        {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
                        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
                    ],
                },
            },
        },
    }


def service(serving: Serving) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": serving.label},
        "spec": {
            "selector": {"app": serving.label},
            "ports": [{"name": "http", "port": 80, "targetPort": PORT}],
        },
    }


def _probe(*, seconds: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": PORT},
        "periodSeconds": seconds,
        "failureThreshold": failures,
    }


def flags(serving: Serving) -> list[str]:
    """The engine's arguments as command line flags."""
    flags = []
    for key, value in serving.engine().items():
        flag = f"--{key.replace('_', '-')}"
        flags.append(flag if value is True else f"{flag}={value}")
    return flags


def _resources(serving: Serving) -> dict[str, Any]:
    limits = {"cpu": "8", "memory": serving.memory}
    if serving.gpu:
        limits["nvidia.com/gpu"] = "1"
    return {"requests": {"cpu": "4", "memory": serving.memory}, "limits": limits}

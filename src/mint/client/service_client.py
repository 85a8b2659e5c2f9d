"""`ServiceClient`: where a program starts. It makes training, sampling and REST clients.

Creation calls return the client itself, ready to use; the client also answers `.result()` and `await` with itself, so
that code written for either style of the Tinker SDK runs. Source: Tinker SDK surface, protocol section 7.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, NoReturn

from mint.client.connect import connect
from mint.client.futures import APIFuture, refuse_inside_loss
from mint.client.rest_client import RestClient
from mint.client.sampling_client import SamplingClient
from mint.client.session import OpenSession
from mint.client.training_client import TrainingClient
from mint.errors import ClosedError, InputError
from mint.service import RunSpec, SamplingSession
from mint.types import GetInfoResponse, GetServerCapabilitiesResponse, LoraConfig
from mint.types.requests import check_user_metadata, refuse, server_only


class ServiceClient:
    """Without `base_url` (and without MINT_BASE_URL) everything runs inside this process.

    All embedded clients of a process share one engine and one copy of each base model. `close()`, or leaving a `with`
    block, frees what was made through this client; so does dropping it and all that was made.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: dict[str, str] | None = None,
    ) -> None:
        """`user_metadata` and `display_name` label the session (`RestClient.get_session`)."""
        refuse("project_id", project_id)
        refuse("default_headers_overrides", default_headers_overrides)
        self._service = connect(base_url, api_key)
        session_id = self._service.create_session(check_user_metadata(user_metadata), display_name).result()
        self._session = OpenSession(self._service, session_id)
        self._closed = False

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: object = None,
    ) -> TrainingClient:
        """A new run: a LoRA adapter of `rank` over `base_model` (a hub id, a folder or a packaged model's name).

        Loads the base model if need be. Raises InputError on arguments that cannot be used, ModelNotFoundError,
        ModelAccessError or HubUnreachableError where the model cannot be had, UnsupportedError for an architecture that
        neither MinT nor transformers runs.
        """
        refuse("optimizer", optimizer)
        lora = LoraConfig(rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        if not isinstance(base_model, str) or not base_model:
            raise InputError(
                f"base_model={base_model!r}: give a hub id such as 'Qwen/Qwen3-0.6B', a folder or a packaged name"
            )
        return self._create_run(base_model, lora, check_user_metadata(user_metadata))

    def _create_run(self, base_model: str, lora: LoraConfig, metadata: dict[str, str]) -> TrainingClient:
        self._check_open()
        spec = RunSpec(self._session.id, base_model, lora, metadata)
        info = APIFuture[GetInfoResponse](self._service.create_run(spec), what=f"loading {base_model}").result()
        return TrainingClient(self._session, info)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: object = None,
    ) -> TrainingClient:
        """A new run of the checkpoint's shape with its weights; Adam starts anew.

        Raises CheckpointNotFoundError, or CheckpointError where the checkpoint is damaged or of another base model than
        `base_model`.
        """
        refuse("optimizer", optimizer)
        return self._from_state(path, base_model, user_metadata, weights_access_token, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """A new run that goes on exactly where the checkpoint was saved: weights, Adam's moments and step, plan."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, with_optimizer=True)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        access_token: str | None,
        *,
        with_optimizer: bool,
    ) -> TrainingClient:
        refuse("weights_access_token", access_token)
        self._check_open()
        info = self._service.weights_info(path, optimizer=with_optimizer).result()
        if base_model is not None and base_model != info.base_model:
            raise InputError(
                f"checkpoint {path} is of base model {info.base_model!r}, not {base_model!r}; leave base_model out"
            )
        assert info.lora_rank is not None
        lora = LoraConfig(
            rank=info.lora_rank,
            train_mlp=bool(info.train_mlp),
            train_attn=bool(info.train_attn),
            train_unembed=bool(info.train_unembed),
        )
        client = self._create_run(info.base_model, lora, check_user_metadata(user_metadata))
        load = client.load_state_with_optimizer if with_optimizer else client.load_state
        load(path).result()
        return client

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Sample from a checkpoint (`model_path`) or from a base model; `model_path` wins where both are given.

        `retry_config` tunes HTTP retries, of which there are none here.
        """
        refuse("record_stability_info", record_stability_info)
        self._check_open()
        if model_path is None and base_model is None:
            raise InputError("create_sampling_client: give model_path (a checkpoint's path) or base_model")
        created = self._service.create_sampling_session(self._session.id, base_model, model_path)
        made = APIFuture[SamplingSession](created, what=f"loading {model_path or base_model}").result()
        return SamplingClient(self._session, made.sampling_session_id, made.base_model)

    def create_rest_client(self) -> RestClient:
        self._check_open()
        return RestClient(service=self._service)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models that are loaded or packaged, with their context lengths where known."""
        self._check_open()
        return self._service.capabilities().result()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this ServiceClient is closed; make a new one")

    def create_custom_loss(self, fn: object, input_ranks: object) -> NoReturn:
        raise server_only("create_custom_loss", "forward_backward_custom takes the function itself")

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> NoReturn:
        raise server_only("copy_weights", "every run of this MINT_HOME can load the checkpoint where it is")

    def get_console_url(self) -> NoReturn:
        raise server_only("get_console_url", "RestClient lists runs and checkpoints")

    def close(self, status: object = None, detail: str | None = None) -> None:
        """Free the runs and sampling sessions made through this client, and the base models when nobody uses them.

        `status` and `detail` are for a server's records; there is none here.
        """
        refuse_inside_loss()
        if not self._closed:
            self._closed = True
            self._session.close()

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # the twins: the same call without blocking the event loop

    async def create_lora_training_client_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        return await asyncio.to_thread(self.create_lora_training_client, *args, **kwargs)

    async def create_training_client_from_state_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        return await asyncio.to_thread(self.create_training_client_from_state, *args, **kwargs)

    async def create_training_client_from_state_with_optimizer_async(self, *args: Any, **kwargs: Any) -> TrainingClient:
        return await asyncio.to_thread(self.create_training_client_from_state_with_optimizer, *args, **kwargs)

    async def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> SamplingClient:
        return await asyncio.to_thread(self.create_sampling_client, *args, **kwargs)

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        return await asyncio.to_thread(self.get_server_capabilities)

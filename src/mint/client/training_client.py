"""`TrainingClient`: one run. Source: Tinker SDK surface, protocol section 7."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

from mint.client.futures import APIFuture, inside_loss, refuse_inside_loss
from mint.client.sampling_client import SamplingClient
from mint.client.session import OpenSession
from mint.errors import ClosedError, InputError
from mint.hub import load_tokenizer
from mint.service import SamplingSession, SaveSpec, Service
from mint.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from mint.types.checkpoints import check_checkpoint_name
from mint.types.requests import (
    check_ttl,
    check_user_metadata,
    prepare_custom_input,
    prepare_training_input,
    refuse,
    server_only,
)

T = TypeVar("T")

# (the datums, their logprobs as torch tensors with gradient) -> (scalar loss, metrics)
CustomLossFn = Callable[[list[Datum], list[Any]], tuple[Any, dict[str, float]]]


class TrainingClient:
    """Operations of a run, executed in the order in which they are called; each returns an APIFuture at once.

    Arguments are checked and copied before a call returns: InputError is raised there. What only the model knows
    (vocabulary, context length) arrives from `.result()`.
    """

    def __init__(self, session: OpenSession, info: GetInfoResponse) -> None:
        self._session, self._service, self._info = session, session.service, info
        # a run whose client nobody holds any more can receive no operation: its memory is given back
        weakref.finalize(self, _unload, session.service, info.model_id).atexit = False

    @property
    def model_id(self) -> str:
        return self._info.model_id

    def _submit(self, what: str, send: Callable[[], Future[T]]) -> APIFuture[T]:
        refuse_inside_loss()
        return APIFuture(send(), owner=self, what=f"{what} of {self.model_id}")

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: dict[str, float] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Logprobs of every datum's targets and the loss, no gradient. Losses are sums over tokens."""
        given = prepare_training_input(data, loss_fn, loss_fn_config)
        return self._submit("forward", lambda: self._service.forward(self.model_id, None, given))

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: dict[str, float] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """As `forward`, and the gradient of the summed loss is added to what the next optim_step uses."""
        given = prepare_training_input(data, loss_fn, loss_fn_config)
        return self._submit("forward_backward", lambda: self._service.forward_backward(self.model_id, None, given))

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLossFn, *, loss_type_input: str = "logprobs"
    ) -> APIFuture[ForwardBackwardOutput]:
        """A loss of your own: `loss_fn(data, logprobs)` returns (scalar, metrics), differentiated by torch.

        logprobs: one float32 tensor per datum, of its target_tokens' shape. The function runs on the engine's thread
        and cannot call MinT. Metric `loss:sum` is its value.
        """
        if loss_type_input != "logprobs":
            raise InputError(f"loss_type_input={loss_type_input!r}: only 'logprobs' is supported")
        if not callable(loss_fn):
            raise InputError(
                f"loss_fn: expected a function (data, logprobs) -> (loss, metrics), got {type(loss_fn).__name__}"
            )
        given = prepare_custom_input(data)
        kept = list(data)

        def loss(logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
            with inside_loss():
                return loss_fn(kept, list(logprobs))

        return self._submit(
            "forward_backward_custom",
            lambda: self._service.forward_backward_custom(self.model_id, None, given, loss),
        )

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step from the accumulated gradient, which is then cleared. Defaults: AdamParams()."""
        if optim_params is not None and adam_params is not None:
            raise InputError("optim_step: give optim_params or adam_params, not both")
        params = next((p for p in (optim_params, adam_params) if p is not None), AdamParams())
        if not isinstance(params, AdamParams):
            raise InputError(f"optim_step: expected types.AdamParams, got {type(params).__name__}")
        return self._submit("optim_step", lambda: self._service.optim_step(self.model_id, None, params))

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Weights, optimizer and plan, to be continued exactly; `.path` of the result names the checkpoint.

        Put a data cursor into `user_metadata` to find your place again.
        """
        spec = _save_spec(name, ttl_seconds, overwrite, user_metadata)
        return self._submit("save_state", lambda: self._service.save_weights(self.model_id, None, spec))

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Replace the weights by a checkpoint's; Adam starts anew and the gradient is cleared."""
        return self._load(path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Replace weights, Adam's moments and step, and plan: training goes on bit for bit."""
        return self._load(path, weights_access_token, optimizer=True)

    def _load(self, path: str, access_token: str | None, *, optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        refuse("weights_access_token", access_token)
        return self._submit(
            "load_state", lambda: self._service.load_weights(self.model_id, None, path, optimizer=optimizer)
        )

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """The adapter alone, for sampling later: `create_sampling_client(model_path=result.path)`."""
        spec = _save_spec(name, ttl_seconds, overwrite, user_metadata)
        return self._submit(
            "save_weights_for_sampler",
            lambda: self._service.save_weights_for_sampler(self.model_id, None, spec),
        )

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> SamplingClient:
        """A client of the weights as they are now; training on does not change what it samples.

        `name` is accepted and not used: the snapshot is unlisted and goes with its client.
        """
        refuse("record_stability_info", record_stability_info)
        if kind != "snapshot":
            raise InputError(f"kind={kind!r}: only 'snapshot' is supported")
        if name is not None:
            check_checkpoint_name(name)
        saved = self._submit(
            "save_weights_and_get_sampling_client",
            lambda: self._service.save_weights_for_sampler(self.model_id, None, SaveSpec(None)),
        ).result()
        assert saved.sampling_session_id is not None
        return SamplingClient(self._session, saved.sampling_session_id, str(self._info.model_name))

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: object = None
    ) -> NoReturn:
        raise server_only("save_weights_external", "save_weights_for_sampler writes a PEFT adapter under MINT_HOME")

    def create_sampling_client(
        self, model_path: str, retry_config: object = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """Sample from a saved checkpoint."""
        refuse("record_stability_info", record_stability_info)
        created = self._service.create_sampling_session(self._session.id, None, model_path)
        made = APIFuture[SamplingSession](created, what=f"loading {model_path}").result()
        return SamplingClient(self._session, made.sampling_session_id, made.base_model)

    def get_info(self) -> GetInfoResponse:
        """What this run is: base model, rank, seed, wrapped modules, parameter count, device, dtype, plan."""
        return self._service.get_info(self.model_id).result()

    def get_console_url(self) -> NoReturn:
        raise server_only("get_console_url", "RestClient lists runs and checkpoints")

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, a transformers object."""
        return load_tokenizer(str(self._info.model_data.tokenizer_id))

    # the call style that asks the creation call for its result

    def result(self, timeout: float | None = None) -> TrainingClient:
        return self

    async def result_async(self, timeout: float | None = None) -> TrainingClient:
        return self

    def __await__(self) -> Generator[Any, None, TrainingClient]:
        return self.result_async().__await__()

    # the twins: each hands out the same future, to be awaited

    async def forward_async(self, *args: Any, **kwargs: Any) -> APIFuture[ForwardBackwardOutput]:
        return self.forward(*args, **kwargs)

    async def forward_backward_async(self, *args: Any, **kwargs: Any) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward(*args, **kwargs)

    async def forward_backward_custom_async(self, *args: Any, **kwargs: Any) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward_custom(*args, **kwargs)

    async def optim_step_async(self, *args: Any, **kwargs: Any) -> APIFuture[OptimStepResponse]:
        return self.optim_step(*args, **kwargs)

    async def save_state_async(self, *args: Any, **kwargs: Any) -> APIFuture[SaveWeightsResponse]:
        return self.save_state(*args, **kwargs)

    async def load_state_async(self, *args: Any, **kwargs: Any) -> APIFuture[LoadWeightsResponse]:
        return self.load_state(*args, **kwargs)

    async def load_state_with_optimizer_async(self, *args: Any, **kwargs: Any) -> APIFuture[LoadWeightsResponse]:
        return self.load_state_with_optimizer(*args, **kwargs)

    async def save_weights_for_sampler_async(
        self, *args: Any, **kwargs: Any
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        return self.save_weights_for_sampler(*args, **kwargs)

    async def save_weights_and_get_sampling_client_async(self, *args: Any, **kwargs: Any) -> SamplingClient:
        return await asyncio.to_thread(self.save_weights_and_get_sampling_client, *args, **kwargs)

    async def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> SamplingClient:
        return await asyncio.to_thread(self.create_sampling_client, *args, **kwargs)

    async def get_info_async(self) -> GetInfoResponse:
        return await asyncio.to_thread(self.get_info)

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id} on {self._info.model_name}>"


def _save_spec(name: str, ttl_seconds: int | None, overwrite: bool, user_metadata: dict[str, str] | None) -> SaveSpec:
    return SaveSpec(
        check_checkpoint_name(name), check_ttl(ttl_seconds), bool(overwrite), check_user_metadata(user_metadata)
    )


def _unload(service: Service, run_id: str) -> None:
    with contextlib.suppress(ClosedError):  # its session was closed before, and the run with it
        service.unload(run_id)

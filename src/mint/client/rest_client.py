"""`RestClient`: runs and checkpoints, listed and managed. Source: Tinker SDK surface, protocol section 7."""

from __future__ import annotations

from typing import Any, NoReturn

from mint.client.connect import connect
from mint.client.futures import APIFuture
from mint.errors import InputError
from mint.service import Service
from mint.types import (
    CheckpointsListResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from mint.types.requests import check_ttl, server_only


class RestClient:
    """Needs no session and loads no model."""

    def __init__(
        self, *, base_url: str | None = None, api_key: str | None = None, service: Service | None = None
    ) -> None:
        self._service = service if service is not None else connect(base_url, api_key)

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        return APIFuture(self._service.capabilities())

    def get_training_run(self, training_run_id: str, access_scope: str = "owned") -> APIFuture[TrainingRun]:
        _owned(access_scope)
        return APIFuture(self._service.get_run(training_run_id))

    def get_training_run_by_tinker_path(self, tinker_path: str, access_scope: str = "owned") -> APIFuture[TrainingRun]:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.get_training_run(parsed.training_run_id, access_scope)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return APIFuture(self._service.weights_info(tinker_path))

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """The newest first."""
        _owned(access_scope)
        if project_id is not None:
            raise InputError("project_id: embedded runs belong to no project; leave it out")
        return APIFuture(self._service.list_runs(*_page(limit, offset)))

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        return APIFuture(self._service.list_checkpoints(training_run_id))

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """Checkpoints of all runs, the newest first."""
        return APIFuture(self._service.list_all_checkpoints(*_page(limit, offset)))

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """`checkpoint_id`: weights/NAME or sampler_weights/NAME."""
        return self.delete_checkpoint_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return APIFuture(self._service.delete_checkpoint(tinker_path))

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """The checkpoint expires `ttl_seconds` from now (3600 to ten years), or with None never."""
        return APIFuture(self._service.set_checkpoint_ttl(tinker_path, check_ttl(ttl_seconds)))

    def get_session(self, session_id: str, access_scope: str = "owned") -> APIFuture[GetSessionResponse]:
        """What a ServiceClient of this process made."""
        _owned(access_scope)
        return APIFuture(self._service.get_session(session_id))

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Open ServiceClients of this process, the newest first."""
        _owned(access_scope)
        return APIFuture(self._service.list_sessions(*_page(limit, offset)))

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        return APIFuture(self._service.get_sampler(sampler_id))

    # of the SDK's surface, without a meaning in one process

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> NoReturn:
        raise server_only("publish_checkpoint_from_tinker_path", "share the checkpoint's folder")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> NoReturn:
        raise server_only("unpublish_checkpoint_from_tinker_path", "nothing was published")

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> NoReturn:
        raise server_only("copy_weights", "every run of this MINT_HOME can load the checkpoint where it is")

    def get_external_weights_urls(self, tinker_path: str) -> NoReturn:
        raise server_only("get_external_weights_urls", "the adapter lies under MINT_HOME in PEFT format")

    def assign_session_project(self, session_id: str, project_id: str) -> NoReturn:
        raise server_only("assign_session_project", "there are no projects; use user_metadata")

    def export_session_trace(self, session_id: str) -> NoReturn:
        raise server_only("export_session_trace", "each run's metrics.jsonl holds what was done")

    def search_sessions(self, **query: object) -> NoReturn:
        raise server_only("search_sessions", "list_sessions shows the open ones")

    def whoami(self) -> NoReturn:
        raise server_only("whoami", "there are no accounts here")

    # the twins

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        return await self.get_server_capabilities()

    async def get_training_run_async(self, *args: Any, **kwargs: Any) -> TrainingRun:
        return await self.get_training_run(*args, **kwargs)

    async def get_training_run_by_tinker_path_async(self, *args: Any, **kwargs: Any) -> TrainingRun:
        return await self.get_training_run_by_tinker_path(*args, **kwargs)

    async def get_weights_info_by_tinker_path_async(self, *args: Any, **kwargs: Any) -> WeightsInfoResponse:
        return await self.get_weights_info_by_tinker_path(*args, **kwargs)

    async def list_training_runs_async(self, *args: Any, **kwargs: Any) -> TrainingRunsResponse:
        return await self.list_training_runs(*args, **kwargs)

    async def list_checkpoints_async(self, *args: Any, **kwargs: Any) -> CheckpointsListResponse:
        return await self.list_checkpoints(*args, **kwargs)

    async def list_user_checkpoints_async(self, *args: Any, **kwargs: Any) -> CheckpointsListResponse:
        return await self.list_user_checkpoints(*args, **kwargs)

    async def set_checkpoint_ttl_from_tinker_path_async(self, *args: Any, **kwargs: Any) -> None:
        await self.set_checkpoint_ttl_from_tinker_path(*args, **kwargs)

    async def get_session_async(self, *args: Any, **kwargs: Any) -> GetSessionResponse:
        return await self.get_session(*args, **kwargs)

    async def list_sessions_async(self, *args: Any, **kwargs: Any) -> ListSessionsResponse:
        return await self.list_sessions(*args, **kwargs)

    async def get_sampler_async(self, *args: Any, **kwargs: Any) -> GetSamplerResponse:
        return await self.get_sampler(*args, **kwargs)

    async def delete_checkpoint_async(self, *args: Any, **kwargs: Any) -> None:
        await self.delete_checkpoint(*args, **kwargs)

    async def delete_checkpoint_from_tinker_path_async(self, *args: Any, **kwargs: Any) -> None:
        await self.delete_checkpoint_from_tinker_path(*args, **kwargs)


def _owned(access_scope: str) -> None:
    if access_scope != "owned":
        raise InputError(f"access_scope={access_scope!r}: embedded there is one owner; allowed: 'owned'")


def _page(limit: int, offset: int) -> tuple[int, int]:
    if limit < 1 or offset < 0:
        raise InputError(f"limit={limit}, offset={offset}: limit is at least 1, offset at least 0")
    return limit, offset

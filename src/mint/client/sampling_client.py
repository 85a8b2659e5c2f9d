"""`SamplingClient`: generate from, and score with, one set of weights. Source: Tinker SDK surface, protocol section 7."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Any, NoReturn

from mint.client.futures import APIFuture
from mint.client.session import OpenSession
from mint.errors import ClosedError
from mint.hub import load_tokenizer
from mint.service import Service
from mint.types import ModelInput, SampleResponse, SamplingParams
from mint.types.requests import SampleInput, prepare_sample_input, refuse, server_only


class SamplingClient:
    """Many calls may be in flight at once; they share the running batch."""

    def __init__(self, session: OpenSession, sampling_session_id: str, base_model: str) -> None:
        self._session, self._service = session, session.service
        self._sampling_session_id, self._base_model = sampling_session_id, base_model
        weakref.finalize(self, _close, session.service, sampling_session_id).atexit = False

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: object = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """`num_samples` sequences after `prompt`. The token that ends one is included, once.

        Logprobs are the model's at temperature 1. Sample i of a seed is the same whatever else runs. InputError is
        raised here for arguments, from `.result()` for what the model cannot take.
        """
        refuse("target_prompt_logprobs", target_prompt_logprobs)
        refuse("prompt_alt_tokens_k", prompt_alt_tokens_k)
        refuse("prompt_logprobs_last_n", prompt_logprobs_last_n)
        given = prepare_sample_input(
            prompt,
            num_samples,
            SamplingParams() if sampling_params is None else sampling_params,
            prompt_logprobs=include_prompt_logprobs,
            num_prompt_topk=topk_prompt_logprobs,
            num_sample_topk=topk_sample_logprobs,
        )
        future = self._service.sample(self._sampling_session_id, given)
        return APIFuture(future, owner=self, what=f"sample from {self._base_model}")

    def stream(self, prompt: ModelInput, sampling_params: SamplingParams | None = None) -> Iterator[int]:
        """The tokens of one sequence after `prompt`, each as soon as it is there: those that `sample` would give.

        Leaving the iterator early ends the generation. Raises as `sample`.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        left = threading.Event()

        def on_token(token: int) -> bool:
            arrived.put(token)
            return left.is_set()

        future = self._service.sample(self._sampling_session_id, prepare_sample_input(prompt, 1, params), on_token)
        future.add_done_callback(lambda _: arrived.put(None))

        def tokens() -> Iterator[int]:
            try:
                while (token := arrived.get()) is not None:
                    yield token
                APIFuture(future, owner=self).result()
            finally:
                left.set()

        return tokens()

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """log p(prompt[i] | prompt[:i]) for every token; entry 0 is None."""
        refuse("prompt_logprobs_last_n", prompt_logprobs_last_n)
        checked = prepare_sample_input(prompt, 1, SamplingParams(max_tokens=1))
        given = SampleInput(checked.prompt, 0, checked.params, prompt_logprobs=True)  # scored, nothing generated
        future = self._service.sample(self._sampling_session_id, given)
        return APIFuture(future, lambda response: response.prompt_logprobs, owner=self, what="compute_logprobs")

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, a transformers object."""
        return load_tokenizer(self._base_model)

    def get_sampler_handle(self) -> NoReturn:
        raise server_only("get_sampler_handle", "hand the checkpoint's path on and call create_sampling_client there")

    def __reduce__(self) -> NoReturn:
        raise server_only("a pickled SamplingClient", "make a ServiceClient in the other process")

    def get_base_model(self) -> str:
        return self._base_model

    # the call style that asks the creation call for its result

    def result(self, timeout: float | None = None) -> SamplingClient:
        return self

    async def result_async(self, timeout: float | None = None) -> SamplingClient:
        return self

    def __await__(self) -> Generator[Any, None, SamplingClient]:
        return self.result_async().__await__()

    async def sample_async(self, *args: Any, **kwargs: Any) -> SampleResponse:
        return await self.sample(*args, **kwargs)

    async def compute_logprobs_async(self, *args: Any, **kwargs: Any) -> list[float | None]:
        return await self.compute_logprobs(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<SamplingClient {self._sampling_session_id} on {self._base_model}>"


def _close(service: Service, sampling_session_id: str) -> None:
    with contextlib.suppress(ClosedError):  # the service itself is gone
        service.close_sampling_session(sampling_session_id)

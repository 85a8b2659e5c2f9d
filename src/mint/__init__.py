"""MinT: fine-tune language models with LoRA from an ordinary Python loop.

    import mint
    from mint import types

    client = mint.ServiceClient().create_lora_training_client("SmolLM2-135M-Instruct", rank=16)
    client.forward_backward(datums, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-4)).result()

Importing this loads neither torch nor transformers; they come with the first thing that is computed.
"""

from mint import errors, types
from mint.client.futures import APIFuture
from mint.client.rest_client import RestClient
from mint.client.sampling_client import SamplingClient
from mint.client.service_client import ServiceClient
from mint.client.training_client import TrainingClient
from mint.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    DataError,
    HubUnreachableError,
    InputError,
    MintError,
    MissingExtraError,
    ModelAccessError,
    ModelNotFoundError,
    NumericsError,
    OperationError,
    ResultTimeoutError,
    StorageError,
    UnsupportedError,
)
from mint.types import (
    AdamParams,
    Checkpoint,
    CheckpointType,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
    TrainingRun,
)

__version__ = "0.1.0"

__all__ = [
    "APIFuture",
    "AdamParams",
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointType",
    "ClosedError",
    "DataError",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "HubUnreachableError",
    "InputError",
    "LoraConfig",
    "MintError",
    "MissingExtraError",
    "ModelAccessError",
    "ModelInput",
    "ModelNotFoundError",
    "NumericsError",
    "OperationError",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "RestClient",
    "ResultTimeoutError",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "StorageError",
    "TensorData",
    "TensorDtype",
    "TrainingClient",
    "TrainingRun",
    "UnsupportedError",
    "__version__",
    "errors",
    "types",
]

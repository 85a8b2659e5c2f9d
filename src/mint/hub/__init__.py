"""Where base models, tokenizers and data sets come from: a local folder, the Hugging Face hub and its cache, a Python package.

    source = resolve_model("SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(source)

Weights are only ever read from *.safetensors (and from the GGUF file of a packaged model, checked by its sha256).
Importing this loads none of huggingface_hub, transformers or gguf.
"""

from mint.hub.hub_datasets import dataset_files
from mint.hub.package_files import PACKAGED_MODELS, PackagedModel
from mint.hub.resolve import load_tokenizer, resolve_model
from mint.hub.source import ModelSource

__all__ = ["PACKAGED_MODELS", "ModelSource", "PackagedModel", "dataset_files", "load_tokenizer", "resolve_model"]

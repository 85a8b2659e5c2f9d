"""Where base models, tokenizers and data sets come from: a local folder, the Hugging Face hub and its cache, a Python package.

    source = resolve_model("SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(source)

Weights are only ever read from *.safetensors (and from the GGUF file of a packaged model, checked by its sha256).
Importing this loads none of huggingface_hub, transformers or gguf.
"""

from mint.hub.downloads import fetched_url, is_url, open_compressed, replacing, unpacked, url_file_name
from mint.hub.hub_datasets import HubListing, dataset_files, listed_dataset_files, matching
from mint.hub.package_files import CHITCHAT, PACKAGED_MODELS, PackagedFile, package_file
from mint.hub.resolve import load_tokenizer, local_model, resolve_model
from mint.hub.source import LocalModel, ModelSource

__all__ = [
    "CHITCHAT",
    "PACKAGED_MODELS",
    "HubListing",
    "LocalModel",
    "ModelSource",
    "PackagedFile",
    "dataset_files",
    "fetched_url",
    "is_url",
    "listed_dataset_files",
    "load_tokenizer",
    "local_model",
    "matching",
    "open_compressed",
    "package_file",
    "replacing",
    "resolve_model",
    "unpacked",
    "url_file_name",
]

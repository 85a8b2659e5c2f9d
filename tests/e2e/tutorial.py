"""Chat supervised fine-tuning as users write it: a program on the public calls, with its own tokenizing and batching.

    python tutorial.py no_robots      # or tulu3

Run by test_tutorial.py against a hub on loopback. The calls and their style are those that MinT promises to keep.
"""

import os
import random
import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer

import mint
from mint import types

if os.environ.get("MINT_API_KEY"):
    print("API key loaded")
else:
    print("WARNING: MINT_API_KEY not found!")

service_client = mint.ServiceClient()
print("Connected to MinT")

# 1. configuration
DATASET = sys.argv[1]
BASE_MODEL = "Qwen/Qwen3-0.6B"
LORA_RANK = 16
NUM_STEPS = 12 if DATASET == "no_robots" else 14
BATCH_SIZE = 4
LEARNING_RATE = 1e-4
MAX_LENGTH = 2048
TRAIN_ON = "all_assistant" if DATASET == "no_robots" else "last_assistant"
print(f"Dataset: {DATASET}")
print(f"Steps: {NUM_STEPS}, Batch: {BATCH_SIZE}, LR: {LEARNING_RATE}")

# 2. tokenizer and loss mask
tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL, trust_remote_code=True)
print(f"Vocab size: {tokenizer.vocab_size:,}")
print(f"EOS token: {tokenizer.eos_token!r} (id={tokenizer.eos_token_id})")


def tokenize_conversation(messages, tokenizer, max_length, train_on="all_assistant"):
    """Token ids of the conversation, and 1.0 for those to train on."""
    all_tokens, all_weights = [], []
    for i, msg in enumerate(messages):
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False, add_generation_prompt=False)
        new_tokens = tokenizer.encode(text, add_special_tokens=False)[len(all_tokens) :]
        is_assistant = msg.get("role") == "assistant"
        is_last = i == len(messages) - 1
        if train_on == "all_assistant":
            weight = 1.0 if is_assistant else 0.0
        elif train_on == "last_assistant":
            weight = 1.0 if (is_assistant and is_last) else 0.0
        else:
            weight = 1.0
        all_tokens.extend(new_tokens)
        all_weights.extend([weight] * len(new_tokens))
    if len(all_tokens) > max_length:
        all_tokens, all_weights = all_tokens[:max_length], all_weights[:max_length]
    return all_tokens, np.array(all_weights, dtype=np.float32)


demo_messages = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi there! How can I help you?"},
]
tokens, weights = tokenize_conversation(demo_messages, tokenizer, MAX_LENGTH, TRAIN_ON)
print(f"Tokens: {len(tokens)}")
print(f"Trainable tokens: {int(weights.sum())}")
print(f"Decoded: {tokenizer.decode(tokens)!r}")


# 3. one training datum
def conversation_to_datum(messages, tokenizer, max_length, train_on):
    """Position i of the input predicts token i + 1."""
    tokens, weights = tokenize_conversation(messages, tokenizer, max_length, train_on)
    if len(tokens) < 2:
        raise ValueError("Conversation too short")
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": list(tokens[1:]), "weights": weights[1:].tolist()},
    )


datum = conversation_to_datum(demo_messages, tokenizer, MAX_LENGTH, TRAIN_ON)
print(f"Input length: {datum.model_input.length}")
print(f"Target length: {len(datum.loss_fn_inputs['target_tokens'])}")
print(f"Trainable targets: {sum(datum.loss_fn_inputs['weights']):.0f}")


# 4. data set
@dataclass
class ChatDataset:
    """Conversations, handed out in batches for ever."""

    data: list
    index: int = 0

    def get_batch(self, batch_size):
        batch = []
        for _ in range(batch_size):
            if self.index >= len(self.data):
                self.index = 0
                random.shuffle(self.data)
            batch.append(self.data[self.index])
            self.index += 1
        return batch

    def __len__(self):
        return len(self.data)


def load_chat_dataset(dataset_name, seed=42):
    """Train and test conversations."""
    random.seed(seed)
    if dataset_name == "no_robots":
        ds = load_dataset("HuggingFaceH4/no_robots")
        train_data = [row["messages"] for row in ds["train"]]
        test_data = [row["messages"] for row in ds["test"]]
    elif dataset_name == "tulu3":
        ds = load_dataset("allenai/tulu-3-sft-mixture", split="train")
        ds = ds.shuffle(seed=seed)
        all_data = [row["messages"] for row in ds]
        test_data, train_data = all_data[:1024], all_data[1024:]
    else:
        raise ValueError(f"Unknown dataset: {dataset_name}")
    random.shuffle(train_data)
    return ChatDataset(train_data), ChatDataset(test_data)


train_dataset, test_dataset = load_chat_dataset(DATASET)
print(f"Train: {len(train_dataset)} conversations")
print(f"Test: {len(test_dataset)} conversations")
sample = train_dataset.get_batch(1)[0]
for msg in sample[:3]:
    content = msg["content"][:80] + "..." if len(msg["content"]) > 80 else msg["content"]
    print(f"  [{msg['role']}]: {content}")

# 5. training client
training_client = service_client.create_lora_training_client(
    base_model=BASE_MODEL,
    rank=LORA_RANK,
    train_mlp=True,
    train_attn=True,
    train_unembed=True,
)
print(f"Training client created: {BASE_MODEL}")


def mean_loss(outputs, datums):
    """Negative logprob per trained token, from what the calls hand out."""
    total_loss, total_weight = 0.0, 0.0
    for i, out in enumerate(outputs):
        logprobs = out["logprobs"]
        if hasattr(logprobs, "tolist"):
            logprobs = logprobs.tolist()
        w = datums[i].loss_fn_inputs["weights"]
        if hasattr(w, "tolist"):
            w = w.tolist()
        for lp, wt in zip(logprobs, w):  # noqa: B905
            total_loss += -lp * wt
            total_weight += wt
    return total_loss / max(total_weight, 1)


# 6. training loop
metrics_history = []
for step in range(NUM_STEPS):
    datums = []
    for messages in train_dataset.get_batch(BATCH_SIZE):
        try:
            datums.append(conversation_to_datum(messages, tokenizer, MAX_LENGTH, TRAIN_ON))
        except ValueError:
            continue
    if not datums:
        continue
    fwdbwd_result = training_client.forward_backward(datums, loss_fn="cross_entropy").result()
    loss = mean_loss(fwdbwd_result.loss_fn_outputs, datums)
    training_client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
    metrics_history.append({"step": step, "loss": loss})
    if step % 10 == 0 or step == NUM_STEPS - 1:
        print(f"Step {step:3d}: loss={loss:.4f}")
print(f"Initial loss: {metrics_history[0]['loss']:.4f}")
print(f"Final loss: {metrics_history[-1]['loss']:.4f}")

# 7. evaluation
test_batch = test_dataset.get_batch(min(32, len(test_dataset)))
test_datums = [conversation_to_datum(messages, tokenizer, MAX_LENGTH, TRAIN_ON) for messages in test_batch]
forward_result = training_client.forward(test_datums, loss_fn="cross_entropy").result()
print(f"Test NLL: {mean_loss(forward_result.loss_fn_outputs, test_datums):.4f}")

# 8. picture
plt.figure(figsize=(10, 5))
plt.plot([m["step"] for m in metrics_history], [m["loss"] for m in metrics_history], "b-", linewidth=2)
plt.xlabel("Step")
plt.ylabel("Loss (NLL)")
plt.title(f"{DATASET.upper()} SFT Training")
plt.tight_layout()
plt.savefig(f"{DATASET}_training.png", dpi=150)

# 9. sample
sampling_client = training_client.save_weights_and_get_sampling_client(name=f"{DATASET}-sft-demo")
test_messages = [{"role": "user", "content": "Write a haiku about programming."}]
prompt_text = tokenizer.apply_chat_template(test_messages, tokenize=False, add_generation_prompt=True)
prompt_tokens = tokenizer.encode(prompt_text, add_special_tokens=False)
sample_result = sampling_client.sample(
    prompt=types.ModelInput.from_ints(prompt_tokens),
    num_samples=1,
    sampling_params=types.SamplingParams(
        max_tokens=128,
        temperature=0.7,
        stop_token_ids=[tokenizer.eos_token_id],
    ),
).result()
response = tokenizer.decode(sample_result.sequences[0].tokens)
print("User: Write a haiku about programming.")
print(f"Assistant: {response!r}")
print(f"Generated: {len(sample_result.sequences[0].tokens)} tokens, {sample_result.sequences[0].stop_reason}")

# 10. checkpoint, and on from there
checkpoint = training_client.save_state(name=f"{DATASET}-sft-final").result()
print(f"Checkpoint saved: {checkpoint.path}")
resumed_client = service_client.create_training_client_from_state_with_optimizer(checkpoint.path)
for client in (training_client, resumed_client):
    again = client.forward_backward(test_datums, loss_fn="cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
    after = client.forward(test_datums, loss_fn="cross_entropy").result()
    print(
        f"Continued: {mean_loss(again.loss_fn_outputs, test_datums)!r} {mean_loss(after.loss_fn_outputs, test_datums)!r}"
    )

"""MinT: fine-tune language models with LoRA from an ordinary Python loop."""

"""DeepSpeed as a training engine of verl: `strategy=deepspeed`."""

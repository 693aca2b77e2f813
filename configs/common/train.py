"""How to run. A number of iterations that is None follows from the epochs and the length of the data."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # a file or address in any form that docs/checkpoints.md names
    min_backbone=0.95,  # least share of the tensors of the backbone that it must have
    epochs=12,
    eval_epochs=1,  # between evaluations, and between checkpoints
    max_iter=None,
    clip_norm=0.1,
    amp=dict(enabled=False, dtype="bfloat16"),  # or float16
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=None, max_to_keep=3),
    eval_period=None,
    log_period=20,
    device="cuda",  # the CPU is used where there is no GPU
    seed=42,
)

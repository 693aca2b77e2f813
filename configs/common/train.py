"""How to run. A number of iterations that is None follows from the epochs and the length of the data."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # a file or address in any form that docs/checkpoints.md names
    min_backbone=0.95,  # least share of the tensors of the backbone that it must have
    epochs=12,
    eval_epochs=1,  # between evaluations, and between checkpoints
    max_iter=None,
    reference_batch=None,  # for which the learning rate is meant; None for the recipe's own total_batch_size
    grad_accum_steps=1,  # parts into which the batch of one step is divided
    clip_norm=0.1,
    amp=dict(enabled=False, dtype="bfloat16", evaluation=False),  # or float16; evaluation in that precision too
    activation_checkpointing=[],  # any of backbone, encoder, decoder: less memory, about a third more time
    ema=dict(enabled=False, decay=0.9997),
    skip_non_finite=False,  # go on after a loss or gradient that isn't finite, without that step
    parallel="ddp",  # or fsdp, for models that don't fit into one GPU
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=None, max_to_keep=3),
    best=dict(metric="bbox/AP", mode="max", patience=0),  # evaluations without a better one that end it; 0: never
    eval_period=None,
    log_period=20,
    wandb=dict(enabled=False, project="dino", name=None),
    device="cuda",  # the CPU is used where there is no GPU
    seed=42,  # -1 for another one each time
    deterministic=False,
)

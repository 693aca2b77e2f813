"""How to run. A number of iterations follows from the epochs and the length of the data.

The comments are the descriptions in docs/settings.md.
"""

from dino.training.recipe_lengths import iterations

train = dict(
    output_dir="./output",  # folder of the run; one that holds a run is refused without --resume
    init_checkpoint="",  # weights to start from or to evaluate: a file or address in any form of docs/checkpoints.md
    init_parts="all",  # or backbone: of that file, only the backbone; asked for, it may be any detector's
    min_backbone=0.95,  # least share of the backbone's tensors that it must have
    epochs=12,  # length of the training; may be a fraction
    eval_epochs=1,  # between evaluations, and between checkpoints
    max_iter=iterations("train.epochs"),  # length in iterations, instead of epochs
    reference_batch=None,  # total batch for which the learning rate is meant; None for the recipe's own
    grad_accum_steps=1,  # parts into which the batch of one step is divided: less memory
    clip_norm=0.1,  # gradients are scaled down to this norm, all together
    amp=dict(
        enabled=False,  # half precision, with matching, boxes and losses in float32
        dtype="bfloat16",  # or float16, whose loss is scaled
        evaluation=False,  # evaluate in that precision too
    ),
    float32_precision="high",  # on a GPU: high uses TF32 for float32 products and convolutions, highest does not
    compile=False,  # let PyTorch compile the network: minutes at the start, then fewer and larger kernels
    cuda_graphs=0,  # in evaluation on a GPU, so many sizes of images are recorded as CUDA graphs: faster, more memory
    cudnn_benchmark=False,  # try which convolution is fastest for each new size; for images of one size, or a few
    activation_checkpointing=[],  # any of backbone, encoder, decoder: less memory, about a third more time
    ema=dict(
        enabled=False,  # keep a running average of the weights, evaluate and store it too
        decay=0.9997,  # share of the average that stays at each step
    ),
    skip_non_finite=False,  # skip a step whose loss or gradient isn't finite, and continue
    parallel="ddp",  # or fsdp, for models that don't fit into one GPU
    ddp=dict(
        broadcast_buffers=False,  # of DistributedDataParallel: copy buffers of the first process at every step
        find_unused_parameters=False,  # of DistributedDataParallel: not needed, every parameter gets a gradient
        fp16_compression=False,  # send gradients in float16
    ),
    checkpointer=dict(
        period=iterations("train.eval_epochs"),  # iterations between checkpoints
        max_to_keep=3,  # how many numbered checkpoints stay
    ),
    best=dict(
        metric="bbox/AP",  # what the best weights are best in
        mode="max",  # or min
        patience=0,  # evaluations without a better value after which the training ends; 0: never
    ),
    eval_period=iterations("train.eval_epochs", least=0),  # iterations between evaluations; 0 for the last one only
    log_period=20,  # iterations between lines of the log
    log_matching=False,  # log class_error, cardinality_error and count_error of the last decoder layer too
    wandb=dict(
        enabled=False,  # log to Weights & Biases too (pip install wandb)
        project="dino",  # its project
        name=None,  # of the run there; None for one that wandb makes up
    ),
    device="cuda",  # the CPU is used where there is no GPU
    seed=42,  # of weights, order, augmentation and noise; -1 for another one each time
    deterministic=False,  # choose kernels that give the same bits again, where PyTorch has them
)

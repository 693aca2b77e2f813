"""What all ablations share: the small network of the shapes, trained on whatever data the command line names."""

from ..dino_r18_small_data import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.out_channels = 64
model.network.encoder.hidden_dim = 256

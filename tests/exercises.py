"""Two exercises that have no function of their own in the project: what the training loops do in passing, and what
torchvision does for us. The other exercises are functions of clipbert.py, data.py and finetune.py (see ASSIGNMENT.md).
"""

import torch
from torch import nn


def accumulate_gradients(model, optimizer, batches, loss_of, max_norm):
    """One update from several batches, as if they were one large batch (paper, section 4).

        gradient = 1/k sum_j  d loss_of(model, batches[j]) / d parameters,     clipped to norm max_norm, then one step

    batches: a list of k >= 1; each counts the same. loss_of(model, batch) -> scalar, the mean over that batch. No more
    than one batch's activations are in memory at a time. Gradients that the model still holds from before don't count;
    every trainable parameter of the model is in the optimizer.
    -> (mean of the k losses, norm of the gradient before it was clipped): scalar tensors that hold no graph.
    """
    model.zero_grad(set_to_none=True)
    mean_loss = 0.0
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        mean_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return mean_loss, norm


class FrozenBatchNorm(nn.Module):
    """BatchNorm whose statistics and affine numbers never change, in training and testing alike.

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias,     per channel

    weight, bias, running_mean and running_var, (channels,) each, are in the state dict, move with `.to(device)`, and
    are no parameters. A new one does nothing: mean and bias 0, variance and weight 1.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        """(B, channels, H, W) -> (B, channels, H, W)"""
        scale = self.weight * (self.running_var + self.eps).rsqrt()  # (channels,)
        shift = self.bias - self.running_mean * scale  # (channels,)
        return x * scale[:, None, None] + shift[:, None, None]

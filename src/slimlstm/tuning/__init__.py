"""Fine-tuning: a short training run that recovers quality after compression, for any ``nn.Module``."""

from slimlstm.tuning.history import History
from slimlstm.tuning.losses import Loss, StatefulLoss, distillation, divergence
from slimlstm.tuning.sampling import Batches
from slimlstm.tuning.training import finetune

__all__ = ["Batches", "History", "Loss", "StatefulLoss", "distillation", "divergence", "finetune"]

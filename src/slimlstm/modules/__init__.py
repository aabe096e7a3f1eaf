"""Drop-in recurrent modules, and finding and replacing recurrent matrices in any model."""

from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.lstm import LowRankLSTM

__all__ = ["FactoredModule", "LowRankLSTM", "LowRankLSTMCell"]

"""Pairs of all ranks: gathered so that a loss of one rank reaches the features of the others."""

from mmkd.training.gathering import first_of as first_of
from mmkd.training.gathering import gathered as gathered
from mmkd.training.gathering import ranks as ranks
